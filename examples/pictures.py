"""`python examples/pictures.py`: the pictures that `make demo` animates, from scenes that no training has seen.

Each is the first held-out scene of its colour, shape and motion from seed 50 000 on, whatever a model makes of it.
"""

from itertools import count
from pathlib import Path

from PIL import Image

from trip_reference.demo_world import world

HERE = Path(__file__).parent
PAGE = HERE.parent / "trip_rt" / "serving" / "page" / "examples"  # which shows some of them too
FIRST_SEED, SIZE = 50_000, 256
PICTURES = {
    "ball.png": ("red", "circle", "left"),
    "heart.png": ("blue", "heart", "grows"),
    "star.png": ("red", "star", "spins"),
    "cross.png": ("green", "cross", "right"),
    "triangle.png": ("purple", "triangle", "shrinks"),
    "falling-heart.jpg": ("white", "heart", "down"),
}


def main() -> None:
    for name, wanted in PICTURES.items():
        for seed in count(FIRST_SEED):
            scene, motion, _ = world.sample(seed, held_out=True)
            if (scene.colour, scene.shape, motion) == wanted:
                break
        picture = Image.fromarray(world.render(scene, motion, 1, SIZE)[0])
        for folder in (HERE, PAGE):
            if folder == HERE or (PAGE / name).exists():
                picture.save(folder / name, quality=92)
        print(f"{name}: seed {seed}")


if __name__ == "__main__":
    main()
