"""What is written appears whole, or what was there stays as it was."""

import os

import pytest

from trip_rt.files import whole_file, whole_folder


def test_a_file_is_replaced_at_the_end_alone(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("replace", [True, False])
def test_a_folder_that_is_there(tmp_path, replace):
    path = tmp_path / "frames"
    path.mkdir()
    for name in ("first", "second"):  # the first finds an empty folder, the second a full one
        try:
            with whole_folder(path, replace) as part:
                (part / name).touch()
        except OSError:
            assert name == "second" and not replace
    assert os.listdir(path) == ["second" if replace else "first"] and os.listdir(tmp_path) == [path.name]
    with pytest.raises(KeyboardInterrupt), whole_folder(path, replace) as part:
        (part / "half").touch()
        raise KeyboardInterrupt
    assert "half" not in os.listdir(path) and os.listdir(tmp_path) == [path.name]
