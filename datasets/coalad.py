"""Download of CoalAD, the data set of the paper, from ModelScope (two tar files, MVTec layout)."""

import errno
import io
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from utils.errors import InputError

CATEGORY = "coal_ad"
DATASET = "lyfjwp/CoalAD"
ARCHIVES = ("coal_ad_train.tar", "coal_ad_test.tar")
MAX_MEMBERS = 200_000
MAX_READ = 1 << 24  # bytes; tarfile reads some headers in one go, however long they claim to be
# Names of members: under coal_ad/ and portable, no path, drive or device; macOS adds ._ before a name.
NAME = re.compile(rb"\.|(\./)*(\._)?coal_ad(/+(?!\.\.?(/|$))[^/\\:\x00-\x1f]{1,255}){0,7}")

# The disk's own errors, which must not be mistaken for a failing network.
STORAGE_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EDQUOT}


def ensure_coalad(data_root: str | os.PathLike) -> Path:
    """Return `data_root`/coal_ad; if there is no such folder, download CoalAD and unpack it beside it first.

    Raises InputError if ModelScope does not deliver CoalAD, ConnectionError if the transfer breaks off (the next call
    continues it), and other OSErrors as the disk reports them.
    """
    target = Path(data_root) / CATEGORY
    if os.path.lexists(target):
        return target
    download = target.with_name(f".{CATEGORY}.download")
    download.mkdir(parents=True, exist_ok=True)
    lock = FileLock(download / "lock")
    try:
        turn = lock.acquire(timeout=0)
    except Timeout:
        print("Another run is downloading CoalAD: waiting for it.", file=sys.stderr)
        turn = lock.acquire()
    with turn:
        if not os.path.lexists(target):
            _download(download, target)
            _unpack(download, target)
    shutil.rmtree(download, ignore_errors=True)
    return target


def _by_hand(target: Path) -> str:
    return (
        f"get {' and '.join(ARCHIVES)} from https://www.modelscope.cn/datasets/{DATASET} or the Baidu link "
        f"in the README of the CoalAD authors' repository (code 1234), unpack both in {target.parent}, so "
        f"that {target} holds train/good, test/good, test/<defect> and ground_truth/<defect>/<stem>_mask.png"
    )


def _download(folder: Path, target: Path) -> None:
    """Fetch both archives into `folder`; ModelScope's client resumes transfers, verifies TLS, and checks SHA-256."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        raise InputError(
            f"there is no {target}, and downloading CoalAD takes the package modelscope ({error}): "
            f"run 'pip install modelscope', or {_by_hand(target)}"
        ) from None
    print("Downloading CoalAD from ModelScope; the next run continues a broken transfer.")
    try:
        # cache_dir is where the client keeps its lock files. One worker: one progress bar at a time.
        dataset_snapshot_download(
            DATASET,
            local_dir=str(folder),
            cache_dir=str(folder / "cache"),
            allow_patterns=list(ARCHIVES),
            max_workers=1,
        )
    except Exception as error:
        failures = list(getattr(error, "failed_files", {}).values())  # empty where not even the listing came
        cause = failures[0] if failures else error
        if storage_error := _storage_error(cause):
            raise storage_error from None
        reason = " ".join(str(cause.__cause__ or cause).split())[:300]
        if failures:
            raise ConnectionError(
                f"the download of CoalAD broke off ({reason}): run the same command again to continue it, "
                f"or {_by_hand(target)}"
            ) from error
        raise InputError(
            f"there is no {target}, and ModelScope does not deliver CoalAD ({reason}): {_by_hand(target)}"
        ) from error
    for name in ARCHIVES:
        if not (folder / name).is_file():
            raise InputError(f"ModelScope's data set {DATASET} holds no {name} any more: {_by_hand(target)}")


def _storage_error(error: BaseException | None) -> OSError | None:
    """The disk's own error among the causes of `error`, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            return error
        error = error.__cause__
    return None


def _unpack(download: Path, target: Path) -> None:
    """Unpack both archives in `download` and move the result to `target` in one step."""
    unpacked = download / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    try:
        for name in ARCHIVES:
            try:
                extract(download / name, unpacked)
            except InputError:
                (download / name).unlink()  # otherwise the next call would take it for a finished download
                raise
        for part in ("train/good", "test"):
            if not any((unpacked / CATEGORY).glob(f"{part}/*")):
                raise InputError(f"the downloaded archives hold no {CATEGORY}/{part}: {_by_hand(target)}")
        if hasattr(os, "sync"):
            os.sync()  # the content must be on the disk before the folder has its name
        os.replace(unpacked / CATEGORY, target)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


class _SmallReads(io.FileIO):
    """A file that gives at most MAX_READ bytes at a time, whatever a header asks for."""

    def read(self, size: int = -1) -> bytes:
        return super().read(min(size, MAX_READ) if size >= 0 else MAX_READ)


def extract(archive: Path, folder: Path) -> None:
    """Unpack the plain files of an uncompressed tar archive, all under coal_ad/, into the empty `folder`.

    Nothing is linked, overwritten or placed elsewhere, or unpacks to more than the archive's size: else an InputError.
    """
    try:
        with (
            _SmallReads(archive) as file,
            tarfile.open(archive, "r:", file) as tar,
            tqdm(desc=archive.name, total=archive.stat().st_size, unit="B", unit_scale=True) as bar,
        ):
            for number, member in enumerate(tar):
                if number == MAX_MEMBERS:
                    raise InputError(f"{archive.name} is refused: more than {MAX_MEMBERS} members")
                _extract_member(tar, member, folder)
                bar.update(tar.offset - bar.n)
            # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{archive.name} is damaged or not an uncompressed tar ({error}): run again to download it anew"
        ) from error


def _extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    archive, path = Path(tar.name).name, folder / member.name
    if not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        reason = "is neither a plain file nor a folder"
    elif not NAME.fullmatch(os.fsencode(member.name)):
        reason = f"has no plain name under {CATEGORY}/"
    elif path == folder or path.name.startswith("._") or path.name == ".DS_Store":
        return  # the entry "./", and what macOS adds to an archive
    else:
        try:
            (path if member.isdir() else path.parent).mkdir(parents=True, exist_ok=True)
            if member.isreg():
                with open(path, "xb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)
            return
        except (FileExistsError, NotADirectoryError):
            reason = "is in it twice"
    raise InputError(f"{archive} is refused: its member {member.name[:200]!a} {reason}")
