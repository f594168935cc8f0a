import json
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lib.training import store
from lib.training.store import Rows, Store, write_atomic

LAYOUT = {"a": ((2, 3), np.float32), "b": ((4,), bool)}


def path_of(folder):
    """The flag of model 0 in the only store of a folder."""
    return next(folder.glob("*/done/00000.json"))


def row(k):
    return {"a": np.full((2, 3), k, np.float32), "b": np.arange(4) == k}


def test_rows_are_a_plain_npy_that_grows_in_place(tmp_path):
    rows = Rows(tmp_path / "a.npy", (2, 3), np.float32)
    assert rows.read().shape == (0, 2, 3)
    for k in (0, 11, 5):
        rows.write(k, row(k)["a"])
    plain = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert plain.shape == (12, 2, 3) and isinstance(rows.read(), np.memmap)
    assert plain[11, 0, 0] == 11 and plain[5, 1, 2] == 5 and (plain[6] == 0).all()


def test_a_truncated_file_keeps_its_whole_rows_and_one_of_other_rows_has_none(tmp_path):
    rows = Rows(tmp_path / "a.npy", (2, 3), np.float32)
    rows.write(9, row(9)["a"])
    for shape, dtype in (((6,), np.float32), ((2, 3), np.int32), ((3, 2), np.float32)):
        assert len(Rows(rows.path, shape, dtype).read()) == 0
    with open(rows.path, "r+b") as file:
        file.truncate(rows.header_bytes + 3 * 24 + 5)
    assert len(rows.read()) == 3


def test_a_write_mends_a_damaged_header_and_keeps_the_other_rows(tmp_path):
    rows = Rows(tmp_path / "a.npy", (2, 3), np.float32)
    for k in (0, 4):
        rows.write(k, row(k)["a"])
    with open(rows.path, "r+b") as file:
        file.write(b"not a header")
    assert len(rows.read()) == 0
    rows.write(2, row(2)["a"])
    assert rows.read()[:, 0, 0].tolist() == [0, 0, 2, 0, 4]


def test_a_row_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        Rows(tmp_path / "a.npy", (2, 3), np.float32).write(0, np.zeros((3, 3), np.float32))


def test_a_model_is_finished_only_with_its_flag(tmp_path):
    store = Store(tmp_path, "x", {"lr": 0.1}, LAYOUT)
    store.rows["a"].write(0, row(0)["a"])
    assert store.flag(0) is None
    store.save(0, row(0), status="finished")
    assert Store(tmp_path, "x", {"lr": 0.1}, LAYOUT).flag(0)["status"] == "finished"
    assert Store(tmp_path, "x", {"lr": 0.2}, LAYOUT).flag(0) is None


def test_every_flipped_byte_is_noticed(tmp_path):
    Store(tmp_path, "x", {}, LAYOUT).save(0, row(1), status="finished")
    for name in LAYOUT:
        store = Store(tmp_path, "x", {}, LAYOUT)
        path = store.rows[name].path
        good = path.read_bytes()
        for at in range(store.rows[name].header_bytes, len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert Store(tmp_path, "x", {}, LAYOUT).fault(0, path_of(tmp_path)) == f"{name}.npy has a wrong checksum"
        path.write_bytes(good)
    assert Store(tmp_path, "x", {}, LAYOUT).flag(0)["status"] == "finished"


def test_the_folder_says_what_it_holds(tmp_path):
    store = Store(tmp_path, "digits-mlp-sam", {"recipe": {"lr": 0.1}, "data": "abc"}, LAYOUT)
    assert store.folder.name.startswith("digits-mlp-sam-")
    assert json.loads((store.folder / "recipe.json").read_text())["recipe"] == {"lr": 0.1}


def test_an_atomic_write_leaves_no_litter_and_no_open_door(tmp_path):
    for text in ("one", "two"):
        write_atomic(tmp_path / "f", text)
    assert (tmp_path / "f").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["f"]
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "f", object())
    assert (tmp_path / "f").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_another_version_has_a_folder_of_its_own(tmp_path, monkeypatch):
    old = Store(tmp_path, "x", {"lr": 0.1}, LAYOUT)
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    assert Store(tmp_path, "x", {"lr": 0.1}, LAYOUT).folder != old.folder


def test_a_chunk_has_one_holder_and_passes_on_when_it_ends(tmp_path):
    first, second = (Store(tmp_path, "x", {}, LAYOUT) for _ in range(2))
    held = first.claim(0)
    assert held and second.claim(0) is None and second.claim(32)
    held.release()
    assert second.claim(0)


def test_writers_of_many_rows_at_once_lose_none(tmp_path):
    """Every process keeps its own count of the rows; the header must hold the largest."""
    stores = [Store(tmp_path, "x", {}, LAYOUT) for _ in range(4)]

    def write(part):
        for k in range(part, 40, 4):
            stores[part].save(k, row(k), status="finished")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = Store(tmp_path, "x", {}, LAYOUT)
    assert all(found.flag(k)["status"] == "finished" for k in range(40))
    assert np.load(found.rows["a"].path)[:, 0, 0].tolist() == list(range(40))


def test_a_flipped_bit_of_a_header_never_gives_other_rows(tmp_path):
    rows = Rows(tmp_path / "a.npy", (2, 3), np.float32)
    for k in range(48):
        rows.write(k, row(k)["a"])
    good = rows.path.read_bytes()
    for at in range(8 * rows.header_bytes):
        content = bytearray(good)
        content[at // 8] ^= 1 << at % 8
        rows.path.write_bytes(content)
        found = np.array(rows.read())
        assert len(found) < 48 or (found[:, 0, 0] == np.arange(48)).all()


def test_a_flag_whose_notes_were_changed_is_noticed(tmp_path):
    Store(tmp_path, "x", {}, LAYOUT).save(0, row(1), status="finished")
    (path,) = tmp_path.glob("*/done/00000.json")
    good = path.read_text()
    for damaged in (good.replace('"status"', '"statvs"'), good.replace("finished", "diverged"), "[]", "{}", ""):
        path.write_text(damaged)
        assert Store(tmp_path, "x", {}, LAYOUT).fault(0, path_of(tmp_path))
    path.write_text(good)
    assert Store(tmp_path, "x", {}, LAYOUT).flag(0) == {
        "model": 0, "checksums": json.loads(good)["checksums"], "status": "finished",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[]", "5", "", '{"store_version": 4}'])
def test_a_damaged_recipe_is_written_anew(tmp_path, text):
    folder = Store(tmp_path, "x", {"lr": 0.1}, LAYOUT).folder
    whole = (folder / "recipe.json").read_text()
    (folder / "recipe.json").write_text(text)
    Store(tmp_path, "x", {"lr": 0.1}, LAYOUT)
    assert (folder / "recipe.json").read_text() == whole
