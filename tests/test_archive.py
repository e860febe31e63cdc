import bz2
import errno
import gzip
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import pytest

from metajax.data import archive
from metajax.errors import UserError

CONTENT = {'a/b.txt': b'one', 'c.txt': b'', 'a/d/e.bin': bytes(range(256)) * 9}


def tar_of(mode, members=CONTENT, **changes):
  """A tar archive; a member's content is bytes, or a TarInfo's attributes."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode=f'w{mode}') as tar:
    folder = tarfile.TarInfo('a')
    folder.type = tarfile.DIRTYPE
    tar.addfile(folder)
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      if isinstance(content, dict):
        for attribute, value in content.items():
          setattr(info, attribute, value)
        tar.addfile(info)
      else:
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  return file.getvalue()


def zip_of(members=CONTENT, mode=stat.S_IFREG | 0o644):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a/', b'')
    for name, content in members.items():
      info = zipfile.ZipInfo(name)
      info.external_attr = mode << 16
      info.compress_type = zipfile.ZIP_DEFLATED
      archive.writestr(info, content)
  return file.getvalue()


def parts_of_bz2(content):
  """As pbzip2 writes it: many streams."""
  return b''.join(bz2.compress(content[k : k + 3000]) for k in range(0, len(content), 3000))


def unpack(tmp_path, content):
  (tmp_path / 'x').write_bytes(content)
  archive.unpack([tmp_path / 'x'], tmp_path / 'out')
  return {
    str(path.relative_to(tmp_path / 'out')): path.read_bytes()
    for path in (tmp_path / 'out').rglob('*')
    if path.is_file()
  }


@pytest.mark.parametrize(
  'content',
  [
    tar_of(''),
    tar_of(':gz'),
    tar_of(':xz'),
    parts_of_bz2(tar_of('')),
    zip_of(),
    zip_of(mode=0),  # as on Windows
  ],
)
def test_files_come_out_as_they_went_in(tmp_path, content):
  assert unpack(tmp_path, content) == CONTENT


def test_several_archives_come_into_one_folder(tmp_path):
  (tmp_path / 'x').write_bytes(zip_of({'x/1': b'1'}))
  (tmp_path / 'y').write_bytes(tar_of(':gz', {'y/2': b'2'}))
  archive.unpack([tmp_path / 'x', tmp_path / 'y'], tmp_path / 'out')
  assert sorted(os.listdir(tmp_path / 'out')) == ['x', 'y']


LINK = dict(type=tarfile.SYMTYPE, linkname='/etc')


@pytest.mark.parametrize(
  ('content', 'complaint'),
  [
    (tar_of('', {'../evil': b'x'}), "'../evil' would be written outside"),
    (tar_of('', {'a/../../evil': b'x'}), "'a/../../evil' would be written outside"),
    (tar_of('', {'/tmp/evil': b'x'}), "'/tmp/evil' would be written outside"),
    (zip_of({'../evil': b'x'}), "'../evil' would be written outside"),
    (zip_of({'/evil': b'x'}), "'/evil' would be written outside"),
    (zip_of({'a\\..\\..\\evil': b'x'}), 'would be written outside'),
    (tar_of('', {'link': LINK, 'link/evil': b'x'}), "'link' is neither a file nor a folder"),
    (tar_of('', {'link': dict(type=tarfile.LNKTYPE, linkname='/etc/passwd')}), "'link' is neither"),
    (tar_of('', {'device': dict(type=tarfile.CHRTYPE)}), "'device' is neither"),
    (tar_of('', {'pipe': dict(type=tarfile.FIFOTYPE)}), "'pipe' is neither"),
    (zip_of({'link': b'/etc/passwd'}, stat.S_IFLNK | 0o777), "'link' is neither"),
  ],
)
def test_nothing_is_written_elsewhere(tmp_path, content, complaint):
  with pytest.raises(UserError, match=rf'^{tmp_path}/x is not unpacked: .*{complaint}') as error:
    unpack(tmp_path, content)
  assert '\n' not in str(error.value)
  assert sorted(os.listdir(tmp_path)) == ['x'] and not (tmp_path.parent / 'evil').exists()


def flipped(content, position):
  return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'<!DOCTYPE html><html>',
    tar_of('')[:3000],  # within a file
    tar_of('')[: 512 + 1024],  # between two files
    tar_of('')[: 512 + 1024 + 100],  # within a header
    flipped(tar_of(''), 512 + 1024 + 20),  # a header's checksum
    tar_of(':gz')[:-30],
    flipped(tar_of(':gz'), 200),
    parts_of_bz2(tar_of(''))[:-200],
    tar_of(':xz')[:200],
    zip_of()[:-30],
    flipped(zip_of({'a': os.urandom(1000)}), 500),
  ],
)
def test_damage_is_named(tmp_path, content):
  with pytest.raises(UserError, match=rf'^{tmp_path}/x is damaged or no archive .*: replace it$'):
    unpack(tmp_path, content)
  assert sorted(os.listdir(tmp_path)) == ['x']


def test_an_empty_archive_is_called_one(tmp_path):
  with pytest.raises(UserError, match=r'/x is damaged or no archive \(it is empty\): replace it'):
    unpack(tmp_path, b'')


@pytest.mark.parametrize(
  ('content', 'complaint'),
  [
    (zip_of({'b': b'1', 'b/c': b'2'}), "exists: 'b/c'"),
    (zip_of({'b': b'1', 'b/c/d': b'2'}), "ot a directory: 'b/c/d'"),
    (tar_of('', {'b/c': b'1', 'b': b'2'}), "s a directory: 'b'"),
    (tar_of('', {'.': b'1'}), "s a directory: '.'"),
    (tar_of('', {'b' * 300: b'1'}), "too long: 'bbb"),
    (tar_of('', {'b': dict(pax_headers={'path': 'b\0c'})}), 'null byte'),
  ],
)
def test_names_that_no_disk_takes_are_damage(tmp_path, content, complaint):
  with pytest.raises(UserError, match=rf'^{tmp_path}/x is damaged or no archive \(.*{complaint}') as error:
    unpack(tmp_path, content)
  assert '\n' not in str(error.value) and sorted(os.listdir(tmp_path)) == ['x']


def test_other_errors_of_the_disk_are_not_the_archives(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(archive.shutil, 'copyfileobj', full)
  with pytest.raises(OSError, match='No space left'):
    unpack(tmp_path, zip_of())


def test_an_archive_that_cannot_be_opened_is_named(tmp_path):
  with pytest.raises(UserError, match=rf'^cannot read {tmp_path}: Is a directory; make it readable$'):
    archive.unpack([tmp_path], tmp_path / 'out')


def test_an_archive_that_cannot_be_read_is_named(tmp_path):
  """A file of Linux that opens, and whose first byte no one may read."""
  path = '/proc/self/mem'
  if not os.path.exists(path):
    pytest.skip(f'no {path} on this system')
  with pytest.raises(UserError, match=rf'^cannot read {path}: .*; make it readable$'):
    archive.unpack([path], tmp_path / 'out')


def with_size(size):
  """The header of a file of that size, as its bytes in base 256."""
  header = bytearray(tarfile.TarInfo('b').tobuf(tarfile.GNU_FORMAT))
  header[124:136] = (size % 256**12).to_bytes(12, 'big')
  header[148:156] = b' ' * 8
  header[148:156] = b'%06o\0 ' % sum(header)
  return bytes(header)


@pytest.mark.parametrize(
  'content',
  [
    tar_of('', {'b': dict(pax_headers={'size': '-1536'})}),
    tar_of('', {})[:512] + with_size(-512) + bytes(1024),
  ],
)
def test_a_negative_size_does_not_lead_back(tmp_path, content):
  """In a Python of its own, which would never end."""
  (tmp_path / 'x').write_bytes(content)
  script = (
    'import pathlib, sys; from metajax.data import archive; archive.unpack(sys.argv[1:2], pathlib.Path(sys.argv[2]))'
  )
  command = [sys.executable, '-c', script, tmp_path / 'x', tmp_path / 'out']
  result = subprocess.run(command, capture_output=True, text=True, timeout=20)
  assert re.search(r'UserError: .*/x is damaged or no archive \(a size of -\d+ bytes\)', result.stderr), result.stderr


def test_a_web_page_is_called_one(tmp_path):
  with pytest.raises(UserError, match=r'no archive \(it is a web page\): replace it'):
    unpack(tmp_path, b'\n<!DOCTYPE html><html>Quota exceeded</html>')


def huge_header():
  """A tar file whose one header, of attributes, is 256 MB of zeros; and its compressed form is small."""
  info = tarfile.TarInfo('x')
  info.type, info.size = tarfile.XHDTYPE, 1 << 28
  return gzip.compress(tar_of('')[:1536] + info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))


def test_a_header_is_not_taken_into_memory(tmp_path):
  tracemalloc.start()
  with pytest.raises(UserError, match='a header of 268435456 bytes'):
    unpack(tmp_path, huge_header())
  assert tracemalloc.get_traced_memory()[1] < 30_000_000
  tracemalloc.stop()


def test_a_file_is_unpacked_block_by_block(tmp_path):
  (tmp_path / 'x').write_bytes(tar_of(':gz', {'zeros': bytes(50_000_000)}))
  tracemalloc.start()
  archive.unpack([tmp_path / 'x'], tmp_path / 'out')
  assert tracemalloc.get_traced_memory()[1] < 10_000_000
  tracemalloc.stop()


def test_what_does_not_fit_is_not_begun(tmp_path):
  """A file of 8 TB in an archive of some kilobytes."""
  info = tarfile.TarInfo('big')
  info.size = 1 << 43
  content = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
  with pytest.raises(
    UserError, match=rf"^{tmp_path}/x is not unpacked: 'big' of 8796.1 GB does not fit on the disk .*METAJAX_CACHE"
  ):
    unpack(tmp_path, content)
  assert sorted(os.listdir(tmp_path)) == ['x']


def test_a_password_is_named(tmp_path):
  content = bytearray(zip_of({'a': b'content'}))
  for signature, offset in ((b'PK\3\4', 6), (b'PK\1\2', 8)):  # the flag of encryption, in both headers of the last file
    content[content.rfind(signature) + offset] |= 1
  with pytest.raises(UserError, match=r'damaged or no archive .*encrypted'):
    unpack(tmp_path, bytes(content))
