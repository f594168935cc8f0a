"""No download is trusted, no pickle runs, no archive writes, no page has a script, no file is everyone's to change."""

import ast
import hashlib
import io
import os
import pickle
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib.data import sources
from lib.data.dataset import load
from lib.study import own_logits, report, safe
from lib.study.results import COLUMNS
from lib.study.settings import ROOT
from lib.training.store import Rows
from tests.test_data import cifar_contents, cifar_files, png, tree

OURS = [*sorted((ROOT / "lib").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
OURS += sorted((ROOT / "notebooks").glob("*.py"))


class Evil:
    """Its unpickling makes a folder: what an attacker would run in its place."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# ---- downloads ----------------------------------------------------------------------------------------------


def calls(path):
    """[(dotted name of what is called, keyword arguments)] in a Python file."""
    tree = ast.parse(
        jupytext.writes(jupytext.read(path), "py:percent") if path.parent.name == "notebooks" else path.read_text()
    )
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}) for n in found]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_only_one_line_fetches_and_none_unpickles_or_evaluates(path):
    named = calls(path)
    fetched = [name for name, _ in named if re.search(r"urlopen|urlretrieve|\brequests\.|\bhub\.|from_url", name)]
    assert fetched == ["urlopen"] * (path.name == "sources.py")
    assert not any(keys.get("download") == "True" or keys.get("allow_pickle") == "True" for _, keys in named)
    for name, keys in named:
        assert not re.fullmatch(
            r"(eval|exec|pickle\.loads?|torch\.load|marshal\.\w+|(pd\.)?read_pickle|yaml\.load)", name
        )
        assert name != "np.load" or keys["allow_pickle"] == "False", path.name


def test_what_we_fetch_has_a_checksum_and_no_name_before_it(tmp_path):
    assert all(re.fullmatch(r"[0-9a-f]{64}", sources.SOURCES[name][1]) for name in sources.CIFAR)
    source, kept = tmp_path / "source", tmp_path / "data" / "kept"
    source.write_bytes(b"content")
    with pytest.raises(ValueError, match="fails its checksum: sha256"):
        sources._download(source.as_uri(), kept, "0" * 64)
    assert not list(kept.parent.iterdir())
    sources._download(source.as_uri(), kept, hashlib.sha256(b"content").hexdigest())
    assert kept.read_bytes() == b"content" and list(kept.parent.iterdir()) == [kept]


def test_a_download_that_is_not_what_was_published_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    url = (tmp_path / "cifar-10-python.tar.gz").as_uri()
    monkeypatch.setitem(sources.SOURCES, "cifar10", (url, sources.SOURCES["cifar10"][1], "none"))
    monkeypatch.setattr(sources, "ROOT", tmp_path / "root")
    with pytest.raises(ValueError, match="cifar10 could not be downloaded .*checksum"):
        load("cifar10")
    assert not list((tmp_path / "root" / "data").iterdir()) and not (tmp_path / "ran").exists()


# ---- pickles ------------------------------------------------------------------------------------------------


def evil_npz(path, ran, names):
    """An .npz whose arrays would run something if they were unpickled."""
    np.savez(path, **{name: np.array([Evil(ran)] * 4, dtype=object) for name in names})
    return path


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
    with np.load(evil_npz(tmp_path / "a.npz", tmp_path / "again", ["x"]), allow_pickle=True) as file:
        assert file["x"] is not None and (tmp_path / "again").exists()


def test_arrays_of_objects_are_refused_everywhere(tmp_path):
    ran = tmp_path / "ran"
    path = evil_npz(tmp_path / "a.npz", ran, ("x", "y"))
    with pytest.raises(ValueError, match="data=.*not a readable .npz"):
        load("npz", path)
    with pytest.raises(ValueError, match="logits.*no objects"):
        own_logits.read(evil_npz(tmp_path / "b.npz", ran, ("logits", "y", "member")))
    array = np.array([Evil(ran)] * 4, dtype=object)
    np.save(tmp_path / "logits.npy", array)
    assert len(Rows(tmp_path / "logits.npy", (), np.float32)) == 0
    assert not ran.exists()


def test_a_cache_of_objects_is_made_anew(tmp_path):
    folder, cache, ran = tree(tmp_path / "t"), tmp_path / "cache", tmp_path / "ran"
    first = load("folder", folder, cache)
    (file,) = cache.iterdir()
    evil_npz(file, ran, ("x", "y", "x_test", "y_test"))
    assert load("folder", folder, cache).hash == first.hash and not ran.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_the_right_checksum_still_runs_nothing(tmp_path, monkeypatch, protocol):
    _, contents = cifar_contents()
    contents["a"] = pickle.dumps(Evil(tmp_path / "ran"), protocol)
    cifar_files(monkeypatch, contents)
    for name, content in contents.items():
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
    with pytest.raises(ValueError, match="data=.*a pickle asks for (posix|nt).mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "numpy.load", "numpy.core.multiarray.fromfile"])
def test_no_other_name_is_found_by_the_unpickler(name):
    with pytest.raises(ValueError, match="a pickle asks for"):
        sources.Plain(io.BytesIO()).find_class(*name.rsplit(".", 1))


# ---- archives -----------------------------------------------------------------------------------------------

ESCAPES = ("../out.png", "../../train/cat/out.png", "train/../../out.png", "train/cat/../../../out.png", "/tmp/out.png",
           "C:\\train\\cat\\out.png", "train\\..\\..\\out.png", "train/cat/..", "./../train/cat/out.png")  # fmt: skip


def hostile_tar(path, folder, target):
    """A tar of images, and what would write to `target` if it were extracted as it stands."""
    content = png()
    with tarfile.open(path, "w:gz") as out:
        out.add(folder / "train", "train")
        out.add(folder / "test", "test")
        for name in (*ESCAPES, str(target / "out.png"), "train/cat/link/out.png"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            for name in ("train/cat/link", f"train/cat/{kind.decode()}.png"):
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.mode = kind, str(target), 0o777
                out.addfile(info)
    return path


def hostile_zip(path, folder, target):
    """The same as a zip."""
    with zipfile.ZipFile(path, "w") as out:
        for file in folder.rglob("*.png"):
            out.write(file, file.relative_to(folder))
        link = zipfile.ZipInfo("train/cat/link")
        link.external_attr = 0o120777 << 16
        out.writestr(link, str(target))
        for name in (*ESCAPES, str(target / "out.png")):
            out.writestr(name, png())
    return path


def everything_below(folder):
    return {(p, p.stat(follow_symlinks=False).st_mtime_ns) for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


@pytest.mark.parametrize("make, name", [(hostile_tar, "a.tar.gz"), (hostile_zip, "a.zip")])
def test_no_member_of_an_archive_is_written_or_followed(tmp_path, make, name):
    place, target = tmp_path / "deep" / "below", tmp_path / "target"
    for folder in (place, target):
        folder.mkdir(parents=True)
    folder = tree(tmp_path / "t")
    path = make(place / name, folder, target)
    before = everything_below(tmp_path)
    found = load("folder", path, tmp_path / "cache")
    new = everything_below(tmp_path) - before
    assert found.hash == load("folder", folder, tmp_path / "cache").hash
    assert {p.parent for p, _ in new} == {tmp_path / "cache"} and not list(target.iterdir())
    assert not Path("/tmp/out.png").exists()


@pytest.mark.parametrize("limit, match", [("MOST_IMAGE", "0.png has .* MB unpacked; at most"),
                                          ("MOST_ARCHIVE", "the most that is read")])  # fmt: skip
@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
def test_what_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch, form, limit, match):
    path = folder = tree(tmp_path / "t")
    if form != "folder":
        path = (hostile_zip if form == "zip" else hostile_tar)(tmp_path / f"a.{form}", folder, tmp_path)
    monkeypatch.setattr(sources, limit, 100)
    with pytest.raises(ValueError, match=f"data=.*{match}"):
        load("folder", path, tmp_path / "cache")


def test_a_bomb_of_zeros_costs_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("train/cat/0.png", bytes(sources.MOST_IMAGE + 1))
    assert os.path.getsize(tmp_path / "a.zip") < 1e6
    with pytest.raises(ValueError, match="0.png has 67 MB unpacked; at most 67 are read"):
        load("folder", tmp_path / "a.zip", tmp_path / "cache")


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    folder = tree(tmp_path / "t")
    Image.new("1", (9000, 9000)).save(folder / "train" / "cat" / "big.png")
    with pytest.raises(ValueError, match="big.png cannot be used: 9000 x 9000 pixels; at most 67 million"):
        load("folder", folder, tmp_path / "cache")


def test_an_npz_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 1000)), y=np.zeros(1000, int))
    np.savez_compressed(tmp_path / "b.npz", logits=np.zeros((2, 1000, 1000)), y=np.zeros(1000, int))
    monkeypatch.setattr(sources.os, "sysconf", lambda name: 1024)
    with pytest.raises(ValueError, match="its arrays take 0.0 GB, the memory is 0.0 GB"):
        load("npz", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="b.npz: .*the memory is"):
        own_logits.read(tmp_path / "b.npz")


# ---- pages --------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<b onclick='alert(1)'>b</b>",
    "<a href='javascript:alert(1)'>a</a>", "<a href='jAva\tscript&colon;alert(1)'>a</a>", "<iframe src=//x></iframe>",
    "<a href=' data:text/html,<script>alert(1)</script>'>a</a>", "<form action=javascript:alert(1)><button>x</form>",
    "[a](javascript:alert(1))", "![a](https://example.org/x.png)", "<object data=x></object><embed src=x>",
    "<style>@import 'https://example.org/x.css'</style>", "<style>a{background:url(//x)}</style>",
    "<link rel=stylesheet href=//x>", "<meta http-equiv=refresh content='0;url=//x'>", "<base href=//x>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>",
    "<style><!--</style><img src=x onerror=alert(1)>-->", "</title></style></body><script>alert(1)</script>",
    '"><script>alert(1)</script>', "'onmouseover='alert(1)", "<<script>alert(1)//<</script>", "<p style='x:url(//x)'>p",
    "<details open ontoggle=alert(1)>d", "<video><source onerror=alert(1)></video>", "<script",
    "<img src=x onerror=alert(1)", "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>", "<plaintext>",
    "<math><annotation-xml encoding='text/html'><script>alert(1)</script></annotation-xml></math>",
    "$x<img src=x onerror=alert(1)>$", "<textarea><script>",
]  # fmt: skip
BAD_TAGS = (
    "script iframe object embed svg link base form button input video audio source applet frame noscript template"
)


def tree_of(page):
    """The elements of a page as a browser builds them: [(tag, attributes)]."""
    html5lib = pytest.importorskip("bleach._vendor.html5lib")
    found = html5lib.parse(page, namespaceHTMLElements=False).iter()
    return [(str(e.tag).split("}")[-1], dict(e.attrib), e.text) for e in found if isinstance(e.tag, str)]


def assert_harmless(page):
    """No element that runs or loads, no handler, no link with a script, and a policy that forbids them."""
    elements = tree_of(page)
    assert not {tag for tag, _, _ in elements} & set(BAD_TAGS.split())
    for tag, attributes, text in elements:
        assert not [name for name in attributes if name.lower().startswith("on") or name in ("style", "srcset")], tag
        for name in ("href", "src", "action", "data"):
            url = re.sub(r"[\x00-\x20]", "", attributes.get(name, "")).lower()
            assert not re.match(r"(javascript|vbscript|data(?!:image/(png|jpeg|gif|webp);)):?", url), url
        assert tag != "img" or attributes.get("src", "data:").startswith("data:")
        assert tag != "style" or not re.search(r"@import|url\(", text or "")
        assert tag != "meta" or attributes.get("http-equiv", "Content-Security-Policy") == "Content-Security-Policy"
    policies = [a["content"] for tag, a, _ in elements if tag == "meta" and "http-equiv" in a]
    assert policies == [safe.POLICY] and "script-src" not in safe.POLICY and "default-src 'none'" in safe.POLICY


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_runs_that_a_page_is_given(text):
    for wrapped in (text, f"<table><tr><td>{text}</td></tr></table>", f"<math><mi>{text}</mi></math>", f"<pre>{text}"):
        once = safe.harmless(wrapped)
        assert_harmless(report.page(text, wrapped))
        assert_harmless(report.page(text, once))


def test_the_judge_of_pages_sees_a_script():
    good = report.page("t", "<p>x</p>")
    assert_harmless(good)
    for bad in ("<script>1</script>", "<img src=x>", "<p onclick=1>", "<a href=javascript:1>", "<p style=x>"):
        with pytest.raises(AssertionError):
            assert_harmless(good.replace("<p>", f"{bad}<p>"))
    with pytest.raises(AssertionError):
        assert_harmless(good.replace("default-src", "x"))


def test_what_a_page_needs_stays():
    kept = (
        '<h1 id="a">A &amp; B</h1><p>a <strong>b</strong> <code>x &lt; y</code></p><table><tr><td colspan="2">1</td>'
        '</tr></table><a href="01_x.html">one</a><a href="https://arxiv.org/abs/2310.00488">two</a><img alt="a" '
        'src="data:image/png;base64,AAAA"><style>#T_a td { color: red }</style><math display="block"><mi>x</mi></math>'
    )
    assert safe.harmless(kept) == kept
    assert safe.harmless("<ns0:math><ns0:mi>x</ns0:mi></ns0:math>") == "<math><mi>x</mi></math>"


def hostile_notebook(path):
    """An executed notebook whose text and outputs hold all that is hostile."""
    every = "\n\n".join(HOSTILE)
    outputs = [new_output("display_data", {kind: every, "text/plain": "x"}) for kind in
               ("text/html", "text/markdown", "image/svg+xml", "application/javascript", "text/latex")]  # fmt: skip
    outputs.append(new_output("stream", name="stdout", text=every))
    outputs.append(new_output("error", ename=HOSTILE[0], evalue=HOSTILE[1], traceback=HOSTILE))
    cells = [new_markdown_cell(f"# {HOSTILE[0]}\n\n{every}"), new_code_cell(f'x = """{every}"""', outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), path)


def test_reports_of_hostile_data_have_no_script(tmp_path):
    rows = []
    for text in ("".join(HOSTILE), *HOSTILE[:4]):
        for optimizer in ("sgd", "sam-sgd"):
            row = dict.fromkeys(COLUMNS, text) | {"metric": "test_accuracy", "value": 0.1, "ci_low": 0, "ci_high": 0.2}
            rows.append(row | {"optimizer": optimizer, "n_models": 8, "n_examples": 80, "attack": ""})
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    hostile_notebook(tmp_path / "01_<img src=x onerror=alert(1)>.ipynb")
    report.build(tmp_path)
    pages = list((tmp_path / "report").glob("*.html"))
    assert len(pages) == 2
    for page in pages:
        assert_harmless(page.read_text())
        assert "alert(1)" in page.read_text()  # it is shown, as text


def test_the_audit_of_hostile_names_has_no_script(tmp_path):
    rng, member = np.random.default_rng(0), np.arange(40) % 2 == 0
    arrays = {"logits": rng.normal(size=(40, 2)), "y": np.arange(40) // 2 % 2, "member": member}
    names = (HOSTILE[0], HOSTILE[1], "<a href='javascript:alert(1)'>a")
    own_logits.audit(
        {name: {**arrays, "logits": arrays["logits"] + k} for k, name in enumerate(names)}, tmp_path / "out"
    )
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert_harmless(page)
    assert "alert(1)" in page


# ---- modes --------------------------------------------------------------------------------------------------


def everything(folder):
    """Write one of everything: stores, results, figures, reports, caches, a download, an audit."""
    from benchmarks import faults

    folder = Path(folder)
    faults.small(folder)
    hostile_notebook(folder / "out" / "01_a.ipynb")
    report.build(folder / "out")
    load("folder", tree(folder / "images"), folder / "store" / "cache")
    (folder / "source").write_bytes(b"x")
    known = hashlib.sha256(b"x").hexdigest()
    sources._download((folder / "source").as_uri(), folder / "data" / "kept", known)
    test_the_audit_of_hostile_names_has_no_script(folder / "audit")


def test_no_file_is_world_writable_even_where_the_user_allows_it(tmp_path):
    code = "import os, sys; os.umask(0); from tests.test_safety import everything; everything(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [p for p in (tmp_path / "run").rglob("*") if not p.is_symlink()]
    suffixes = {p.suffix for p in written}
    assert {".npy", ".npz", ".json", ".csv", ".png", ".html", ".lock"} <= suffixes and len(written) > 50
    loose = [str(p.relative_to(tmp_path)) for p in written if stat.S_IMODE(p.stat().st_mode) & stat.S_IWOTH]
    assert not loose
