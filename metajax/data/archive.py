"""Unpacking archives that strangers made."""

import contextlib
import errno
import io
import lzma
import os
import pathlib
import shutil
import stat
import tarfile
import zipfile
import zlib

from metajax.errors import UserError, first_line

_BLOCK = 1 << 20  # bytes
_MAX_HEADER = 1 << 20  # bytes of a long name or of attributes in a tar file, which tarfile takes into memory
_RESERVE = 1 << 27  # bytes of the disk to leave free
_DAMAGE = (
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
  EOFError,
  NotImplementedError,  # a compression that Python does not know
  RuntimeError,  # a password
  ValueError,
)
_NAME_ERRORS = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)  # of a file's name, not of the disk


def unpack(paths, folder):
  """Unpacks zip and tar archives, the latter of any compression, into a folder that appears whole or not at all.

  Files alone are unpacked, and nothing outside the folder is touched. Memory holds a block at a time.

  Args:
    paths: of the archives.
    folder: path, not there yet.

  Raises:
    UserError: an archive is damaged, or has a link, a device, a name that leads out of the folder, or more than the
      disk can take, or cannot be read.
    OSError: the disk cannot be written to.
  """
  partial = folder.with_name(folder.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    for path in paths:
      with io.BufferedReader(_Archive(path)) as file:
        try:
          _unpack(path, file, partial)
        except UserError:
          raise
        except (OSError, *_DAMAGE) as error:
          if getattr(error, 'errno', None):  # the disk's: what decompression raises has none
            raise
          raise UserError(f'{path} is damaged or no archive ({_reason(file, error)}): replace it') from error
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


class _Archive(io.FileIO):
  """The archive, whose errors are told from those of what is written."""

  def __init__(self, path):
    with _reading(path):
      super().__init__(path)

  def readinto(self, buffer):
    with _reading(self.name):
      return super().readinto(buffer)


@contextlib.contextmanager
def _reading(path):
  try:
    yield
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}; make it readable') from error


def _reason(file, error):
  file.seek(0)
  start = file.read(100)
  if not start:
    return 'it is empty'
  return 'it is a web page' if start.lstrip()[:1] == b'<' else first_line(error).removesuffix(' successfully:')


def _unpack(path, file, folder):
  from tqdm import tqdm  # only here, to keep importing this quick

  is_zip = zipfile.is_zipfile(file)
  file.seek(0)
  with tqdm(
    total=os.path.getsize(path), desc=f'unpacking {os.path.basename(path)}', unit='B', unit_scale=True, disable=None
  ) as bar:
    for name, size, content in _zip_members(file) if is_zip else _tar_members(file):
      parts = pathlib.PurePosixPath(name.replace('\\', '/')).parts
      if name.startswith('/') or '..' in parts:
        raise UserError(f'{path} is not unpacked: {name!r} would be written outside of its folder; do not trust it')
      if content is None:
        raise UserError(f'{path} is not unpacked: {name!r} is neither a file nor a folder but a link or a device')
      free = shutil.disk_usage(folder).free - _RESERVE
      if size > free:
        raise UserError(
          f'{path} is not unpacked: {name!r} of {size / 1e9:.1f} GB does not fit on the disk of {folder.parent} '
          f'({max(free, 0) / 1e9:.1f} GB free); make room, or set METAJAX_CACHE to a folder on another'
        )
      target = folder.joinpath(*parts)
      with content, _create(target, name) as out:
        shutil.copyfileobj(content, out, _BLOCK)
      bar.update(file.tell() - bar.n)


def _create(path, name):
  """Opens a file to write to, of that name in the archive."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, 'wb')
  except OSError as error:
    if error.errno not in _NAME_ERRORS:
      raise
    raise ValueError(f'{error.strerror}: {name!r}') from error


def _zip_members(file):
  """Yields (name, size, binary file or None for what is no file) of all but folders."""
  with zipfile.ZipFile(file) as archive:
    for member in archive.infolist():
      kind = stat.S_IFMT(member.external_attr >> 16)
      if not member.is_dir():
        yield member.filename, member.file_size, archive.open(member) if kind in (0, stat.S_IFREG) else None


def _tar_members(file):
  """Likewise."""
  with tarfile.open(fileobj=file, tarinfo=_Member) as archive:
    while (member := archive.next()) is not None:
      archive.members = []  # or the list of them takes more memory than they do
      if not member.isdir():
        yield (
          member.name,
          member.size,
          archive.extractfile(member) if member.isreg() and not member.issparse() else None,
        )
    # To tarfile a header that is cut short or garbled is an end like any other. The real one is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise tarfile.ReadError(f'unreadable from byte {archive.offset} on')
    while archive.fileobj.read(_BLOCK):  # to the end, where a compressed file's checksum is
      pass


_HEADERS = (
  tarfile.XHDTYPE,
  tarfile.XGLTYPE,
  tarfile.SOLARIS_XHDTYPE,
  tarfile.GNUTYPE_LONGNAME,
  tarfile.GNUTYPE_LONGLINK,
)


class _Member(tarfile.TarInfo):
  def _proc_member(self, archive):
    if self.type in _HEADERS and self.size > _MAX_HEADER:
      raise tarfile.SubsequentHeaderError(f'a header of {self.size} bytes')
    self._check_size()
    member = super()._proc_member(archive)
    member._check_size()  # again, as a header of attributes may have replaced it
    return member

  def _check_size(self):
    """A negative one would lead back to where tarfile was before, for ever."""
    if self.size < 0:
      raise tarfile.SubsequentHeaderError(f'a size of {self.size} bytes')
