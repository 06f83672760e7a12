"""What listeners of a job are told."""

from __future__ import annotations

import asyncio

from service_parts import run

from trip_rt.serving.feed import Feed


def test_all_who_follow_are_told_of_all():
    async def test():
        feed, heard = Feed(), {}

        async def follow(name, start=0):
            heard[name] = [event async for event in feed.follow(start)]

        early = [asyncio.create_task(follow(f"early {i}")) for i in range(50)]
        await asyncio.sleep(0)
        assert feed.listeners == 50
        feed.publish("a", 1)
        feed.publish("b", 2)
        await asyncio.sleep(0)
        late = [asyncio.create_task(follow("late")), asyncio.create_task(follow("resumed", 1))]
        ahead = asyncio.create_task(follow("ahead", 3))
        await asyncio.sleep(0)
        feed.publish("c", 3)
        feed.publish("d", 4, last=True)
        await asyncio.gather(*early, *late, ahead)
        whole = [(0, "a", 1), (1, "b", 2), (2, "c", 3), (3, "d", 4)]
        assert heard == {f"early {i}": whole for i in range(50)} | {
            "late": whole,
            "resumed": whole[1:],
            "ahead": whole[3:],
        }
        await follow("afterwards")
        assert heard["afterwards"] == whole and feed.listeners == 0

    run(test())


def test_who_stops_following_is_not_counted():
    async def test():
        feed = Feed()
        task = asyncio.create_task(anext(feed.follow()))
        await asyncio.sleep(0)
        assert feed.listeners == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert feed.listeners == 0

    run(test())
