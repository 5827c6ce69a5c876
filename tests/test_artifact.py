"""Artifacts on disk: what is written is what is read, whole or not at all."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from convt_tvm import artifact
from convt_tvm.artifact import copy, publish, read, read_manifest, verify
from convt_tvm.digests import canonical, sha256
from convt_tvm.errors import ArtifactCorruptError, ArtifactError, ArtifactNotFoundError
from convt_tvm.manifest import FORMAT, KERNEL_FILE, MANIFEST_FILE, RUNTIME_FILE, Manifest
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

SPEC = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=4, kernel_size=3, stride=2)
FIELDS = {
    "spec": SPEC,
    "target": Target.parse("llvm:x86-64-v2"),
    "schedule": "llvm_test",
    "layout": {"lanes": "co", "block": 4},
    "trace": [["Split", [1, 2]], []],
    "packed_shape": (1, 1, 3, 6, 4),
    "packed_dtype": "float32",
    "versions": {"apache-tvm": "0.27", "torch": None},
    "fingerprint": "f" * 64,
    "tuning": {"code": "c" * 16},
}


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "built" / "library"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 40)
    return path


@pytest.fixture
def published(tmp_path, kernel):
    directory = tmp_path / "artifacts" / "one"
    publish(directory, **FIELDS, files={KERNEL_FILE: kernel})
    return directory


def edit(directory, change):
    """Change the manifest's values and put the right digest on the result."""
    path = directory / MANIFEST_FILE
    values = json.loads(path.read_text())
    change(values)
    values.pop("digest", None)
    values["digest"] = sha256(canonical(values))
    path.write_text(json.dumps(values))


def test_what_is_published_is_read_back(published, kernel):
    manifest, content = read(published)
    assert verify(published) == read_manifest(published) == manifest
    assert {name: getattr(manifest, name) for name in FIELDS} == FIELDS
    assert manifest.tested == {}
    assert content == {KERNEL_FILE: kernel.read_bytes()}
    assert manifest.name == f"{SPEC.name}-{manifest.digest[:12]}"
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert sorted(path.name for path in published.iterdir()) == [KERNEL_FILE, MANIFEST_FILE]


def test_nothing_else_is_left_behind(published):
    assert [path.name for path in published.parent.iterdir()] == [published.name]


def test_the_artifact_has_ordinary_permissions(published):
    mask = os.umask(0)
    os.umask(mask)
    assert published.stat().st_mode & 0o777 == 0o777 & ~mask
    assert (published / KERNEL_FILE).stat().st_mode & 0o777 == 0o666 & ~mask


CHANGES = {
    "spec": ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=4, kernel_size=3, stride=1),
    "target": Target.parse("llvm:x86-64-v3"),
    "schedule": "llvm_other",
    "layout": {"lanes": "co", "block": 8},
    "trace": [["Split", [2, 1]], []],
    "packed_shape": (1, 1, 3, 6, 8),
    "packed_dtype": "float64",
    "versions": {"apache-tvm": "0.28", "torch": None},
    "fingerprint": "e" * 64,
    "tuning": {"code": "d" * 16},
    "resources": [{"function": "convt_kernel", "arch": "sm_90", "registers": 255}],
}


def test_every_field_changes_the_digest(tmp_path, kernel):
    # What was tested is known once there is an artifact: `copy` puts it in.
    assert set(CHANGES) == {item.name for item in fields(Manifest)} - {"format", "files", "digest", "tested"}
    digests = {publish(tmp_path / "same", **FIELDS, files={KERNEL_FILE: kernel}).digest}
    for name, value in CHANGES.items():
        digests.add(publish(tmp_path / name, **FIELDS | {name: value}, files={KERNEL_FILE: kernel}).digest)
    kernel.write_bytes(b"other")
    digests.add(publish(tmp_path / "files", **FIELDS, files={KERNEL_FILE: kernel}).digest)
    assert len(digests) == len(CHANGES) + 2


def test_publishing_the_same_again_touches_nothing(published, kernel):
    before = {path: path.stat().st_mtime_ns for path in (published, *published.iterdir())}
    inode = published.stat().st_ino
    publish(published, **FIELDS, files={KERNEL_FILE: kernel})
    assert {path: path.stat().st_mtime_ns for path in (published, *published.iterdir())} == before
    assert published.stat().st_ino == inode


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways of replacing a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(artifact, "_exchange", lambda first, second: False)


@pytest.mark.usefixtures("way")
def test_other_content_replaces(published, kernel):
    kernel.write_bytes(b"new")
    manifest = publish(published, **FIELDS | {"schedule": "llvm_new"}, files={KERNEL_FILE: kernel})
    assert verify(published) == manifest
    assert (published / KERNEL_FILE).read_bytes() == b"new"
    assert [path.name for path in published.parent.iterdir()] == [published.name]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", [KERNEL_FILE, MANIFEST_FILE])
def test_a_broken_artifact_is_replaced(published, kernel, name):
    (published / name).unlink()
    publish(published, **FIELDS, files={KERNEL_FILE: kernel})
    verify(published)


def test_the_kernel_of_this_file_system_exchanges_directories(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.mkdir()
        (path / path.name).touch()
    if not artifact._exchange(first, second):
        pytest.skip("renameat2 cannot exchange directories here")
    assert (first / "b").exists()
    assert (second / "a").exists()


def test_a_failed_exchange_is_reported_with_the_name(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent"):
        artifact._exchange(tmp_path / "a", tmp_path / "absent")


def test_an_empty_directory_is_used_and_missing_parents_are_made(tmp_path, kernel):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        publish(directory, **FIELDS, files={KERNEL_FILE: kernel})
        verify(directory)


def test_a_directory_of_other_things_is_refused_and_kept(tmp_path, kernel):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(ArtifactError, match=r"home is not empty and no artifact: it holds thesis\.tex; name another"):
        publish(tmp_path / "home", **FIELDS, files={KERNEL_FILE: kernel})
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_file_is_refused_and_kept(tmp_path, kernel):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ArtifactError, match="file is a file; name another directory"):
        publish(tmp_path / "file", **FIELDS, files={KERNEL_FILE: kernel})
    assert (tmp_path / "file").read_text() == "text"


def test_only_an_artifacts_files_are_published(tmp_path, kernel):
    with pytest.raises(ArtifactError, match=r"holds kernel\.so and libtvm_runtime\.so; cannot publish notes\.txt"):
        publish(tmp_path / "x", **FIELDS, files={KERNEL_FILE: kernel, "notes.txt": kernel})
    with pytest.raises(ArtifactCorruptError, match="a manifest's files cannot be"):
        publish(tmp_path / "x", **FIELDS, files={RUNTIME_FILE: kernel})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("step", ["_write", "_sync_directory", "_put_in_place"])
def test_a_failure_on_the_way_leaves_the_old_one_and_no_litter(published, kernel, step, monkeypatch):
    before = verify(published)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, step, fail)
    with pytest.raises(OSError, match="No space left"):
        publish(published, **FIELDS | {"schedule": "llvm_new"}, files={KERNEL_FILE: kernel})
    assert verify(published) == before
    assert [path.name for path in published.parent.iterdir()] == [published.name]


@pytest.mark.parametrize("lasting", [True, False])
def test_what_lasts_is_synced(tmp_path, kernel, lasting, monkeypatch):
    synced = []
    monkeypatch.setattr(artifact.os, "fsync", synced.append)
    publish(tmp_path / "one", **FIELDS, files={KERNEL_FILE: kernel}, lasting=lasting)
    verify(tmp_path / "one")
    # Two files, the directory and its parent.
    assert len(synced) == (4 if lasting else 0)


def test_a_failed_second_rename_puts_the_old_one_back(published, kernel, monkeypatch):
    before = verify(published)
    monkeypatch.setattr(artifact, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail_second(self, to):
        if self.suffix == ".tmp" and not to.exists():
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="Input/output error"):
        publish(published, **FIELDS | {"schedule": "llvm_new"}, files={KERNEL_FILE: kernel})
    monkeypatch.undo()
    assert verify(published) == before


def test_a_kill_before_the_rename_leaves_the_old_one(published, kernel):
    before = verify(published)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from convt_tvm import artifact; from tests.test_artifact import FIELDS\n"
        "artifact._put_in_place = lambda *_: os.kill(os.getpid(), 9)\n"
        "artifact.publish(Path(sys.argv[1]), **FIELDS | {'schedule': 'new'}, files={'kernel.so': Path(sys.argv[2])})"
    )
    root = Path(artifact.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, published, kernel], cwd=root, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert verify(published) == before


def _publish_often(directory, kernel, number, start):
    start.wait()
    for turn in range(15):
        publish(directory, **FIELDS | {"schedule": f"llvm_{(number + turn) % 3}"}, files={KERNEL_FILE: kernel})


def test_concurrent_publishers_leave_one_whole_artifact(tmp_path, kernel):
    directory = tmp_path / "shared" / "one"
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    workers = [context.Process(target=_publish_often, args=(directory, kernel, i, start)) for i in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert verify(directory).schedule in {"llvm_0", "llvm_1", "llvm_2"}
    assert [path.name for path in directory.parent.iterdir()] == ["one"]


def test_copies_are_the_same_artifact(published, tmp_path):
    manifest = copy(published, tmp_path / "copy")
    assert manifest == verify(tmp_path / "copy") == verify(published)
    assert copy(published, published) == manifest


def test_a_copy_with_a_file_more_lists_it(published, tmp_path, kernel):
    manifest = copy(published, tmp_path / "copy", extra={RUNTIME_FILE: kernel})
    assert set(manifest.files) == {KERNEL_FILE, RUNTIME_FILE}
    assert manifest.digest != verify(published).digest
    (tmp_path / "copy" / RUNTIME_FILE).write_bytes(b"other")
    with pytest.raises(ArtifactCorruptError, match=r"libtvm_runtime\.so \(5 bytes\) is not the file that was"):
        verify(tmp_path / "copy")


def test_a_damaged_artifact_is_not_copied(published, tmp_path):
    (published / KERNEL_FILE).write_bytes(b"")
    with pytest.raises(ArtifactCorruptError):
        copy(published, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_files_the_manifest_does_not_list_are_not_looked_at(published):
    (published / RUNTIME_FILE).write_bytes(b"put here by hand")
    assert set(verify(published).files) == {KERNEL_FILE}


@pytest.mark.parametrize("position", [0, 5000, 256 * 40 - 1])
def test_one_flipped_bit_in_the_kernel_is_found(published, position):
    path = published / KERNEL_FILE
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactCorruptError, match=r"kernel\.so \(10240 bytes\) is not the file that was published"):
        verify(published)


def test_a_flipped_bit_anywhere_in_the_manifest_is_an_artifact_error(published):
    path = published / MANIFEST_FILE
    whole = path.read_bytes()
    accepted = []
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        try:
            verify(published)
        except ArtifactError:
            continue
        accepted.append(bytes(data[position : position + 1]))
    assert accepted == []


def test_every_truncation_of_the_manifest_is_an_artifact_error(published):
    path = published / MANIFEST_FILE
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ArtifactCorruptError, match=rf"manifest\.json is not JSON \(.*; {size} bytes\); build it again"
        ):
            verify(published)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"kernel"])
def test_what_is_not_json_is_corrupt(published, text):
    (published / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(ArtifactCorruptError, match=r"manifest\.json is not JSON"):
        read_manifest(published)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_corrupt(published, text):
    (published / MANIFEST_FILE).write_text(text)
    with pytest.raises(ArtifactCorruptError, match=r"manifest\.json: a manifest is a JSON object; found \w+"):
        read_manifest(published)


def test_a_changed_value_under_the_old_digest_is_found(published):
    path = published / MANIFEST_FILE
    path.write_text(path.read_text().replace("llvm_test", "llvm_best"))
    with pytest.raises(ArtifactCorruptError, match="the manifest was changed after it was written: its digest is"):
        read_manifest(published)


@pytest.mark.parametrize("version", [0, FORMAT - 1, FORMAT + 1, "1", None, True, [1]])
def test_another_format_says_which_is_read(published, version):
    edit(published, lambda values: values.update(format=version, novelty=1))
    with pytest.raises(
        ArtifactError, match=rf"has format {re.escape(repr(version))}, this convt_tvm reads format {FORMAT}"
    ) as caught:
        read_manifest(published)
    assert not isinstance(caught.value, ArtifactCorruptError)


def test_missing_and_unknown_fields_are_named(published):
    edit(published, lambda values: values.update(novelty=values.pop("layout")))
    with pytest.raises(ArtifactCorruptError, match=r"lacks the fields \['layout'\] and has the unknown .*'novelty'"):
        read_manifest(published)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", 3),
        ("layout", []),
        ("trace", {}),
        ("packed_shape", [1, 2, 3, 4]),
        ("packed_shape", [1, 2, 3, 4, 0]),
        ("packed_shape", [1, 2, 3, 4, True]),
        ("packed_shape", "11111"),
        ("packed_dtype", "int8"),
        ("packed_dtype", ["float32"]),
        ("versions", {"torch": 2}),
        ("versions", []),
        ("fingerprint", None),
        ("files", {}),
        ("files", {"kernel.so": 1}),
        ("files", ["kernel.so"]),
    ],
)
def test_ill_typed_fields_are_corrupt(published, name, value):
    edit(published, lambda values: values.update({name: value}))
    with pytest.raises(ArtifactCorruptError, match=f"a manifest's {name} cannot be"):
        read_manifest(published)


@pytest.mark.parametrize("name", ["../kernel.so", "/etc/passwd", "..", "", "a/b", "manifest.json"])
def test_files_outside_the_artifact_cannot_be_listed(published, name):
    edit(published, lambda values: values["files"].update({name: "0" * 64}))
    with pytest.raises(ArtifactCorruptError, match="cannot list the file"):
        verify(published)


@pytest.mark.parametrize(
    ("name", "value"),
    [("spec", None), ("spec", {}), ("spec", []), ("target", "llvm"), ("target", {"kind": "llvm"}), ("target", None)],
)
def test_spec_and_target_that_are_none_are_corrupt(published, name, value):
    edit(published, lambda values: values.update({name: value}))
    with pytest.raises(ArtifactCorruptError, match=r"spec or target is not valid"):
        read_manifest(published)


def test_spec_values_of_wrong_types_are_corrupt(published):
    for value in (None, "x", [1, 2, 3], {}, 1.5, -1):
        for name in SPEC.to_json():
            if name != "bias" and (name, value) != ("n", None):
                edit(published, lambda values, name=name, value=value: values["spec"].update({name: value}))
                with pytest.raises(ArtifactCorruptError):
                    read_manifest(published)
                edit(published, lambda values: values.update(spec=SPEC.to_json()))


@pytest.mark.parametrize("digest", ["", None, 3])
def test_a_manifest_without_digest_is_corrupt(published, digest):
    path = published / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": digest}))
    with pytest.raises(ArtifactCorruptError, match="a manifest's digest cannot be"):
        read_manifest(published)


def test_what_is_missing_is_named(published, tmp_path):
    (published / KERNEL_FILE).unlink()
    with pytest.raises(ArtifactNotFoundError, match=r"one lacks kernel\.so, which its manifest lists; build it again"):
        verify(published)
    (published / MANIFEST_FILE).unlink()
    (published / "x").touch()
    with pytest.raises(FileNotFoundError, match=r"one is no artifact: it holds x and no manifest\.json"):
        verify(published)
    with pytest.raises(ArtifactNotFoundError, match="absent: no such directory; build one with `convt-tvm build"):
        verify(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactNotFoundError, match="file: no such directory"):
        verify(tmp_path / "file")


def test_what_cannot_be_read_is_an_artifact_error(published):
    (published / KERNEL_FILE).unlink()
    (published / KERNEL_FILE).mkdir()
    with pytest.raises(ArtifactError, match=r"cannot read .*kernel\.so: Is a directory"):
        verify(published)


def test_what_was_tested_is_in_the_copy_and_under_its_digest(tmp_path, published):
    tested = {"runs": 100, "threads": [1, 2], "same_bits": ["100 runs"]}
    copied = copy(published, tmp_path / "tested", tested=tested)
    assert verify(tmp_path / "tested").tested == tested
    assert copied.digest != read_manifest(published).digest
    assert copy(tmp_path / "tested", tmp_path / "again").digest == copied.digest
