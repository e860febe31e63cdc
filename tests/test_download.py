import collections
import hashlib
import http.server
import os
import re
import resource
import signal
import socket
import struct
import threading

import numpy as np
import pytest

from metajax.data import download
from metajax.errors import UserError

DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()
QUOTA = b'<!DOCTYPE html><html><head><title>Google Drive -\n Quota exceeded</title></head><body>Sorry</body></html>'


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves DATA, misbehaving as the first part of the path says; a server remembers (path, Range) of its requests."""

  def do_GET(self):
    self.server.requests.append((self.path, self.headers.get('Range')))
    self.server.encodings.append(self.headers.get('Accept-Encoding'))
    start = int(re.search(r'\d+', self.headers.get('Range', '0'))[0])
    getattr(self, self.path.split('/')[1].replace('-', '_'))(start)

  def answer(self, body, status=200, kind='application/zip', length=None, **headers):
    self.send_response(status)
    self.send_header('Content-Type', kind)
    if length != 'unknown':
      self.send_header('Content-Length', str(length or len(body)))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.wfile.write(body)

  def good(self, start, stop=None, total=300_000, data=DATA):
    """Serves as it should; with `stop`, the connection ends too soon."""
    if start >= len(DATA):
      self.answer(b'', 416, Content_Range=f'bytes */{total}')
    elif start:
      span = f'bytes {start}-{len(DATA) - 1}/{total}'
      self.answer(data[start:stop], 206, length=len(DATA) - start, Content_Range=span)
    else:
      self.answer(DATA[:stop], length=len(DATA))

  def first_time(self):
    return len(self.server.requests) == 1

  # Right, but unusual.

  def without_range(self, start):
    self.answer(DATA)

  def total_unknown(self, start):
    self.good(start, total='*')

  def length_unknown(self, start):
    if start:
      self.answer(DATA[start:], 206, length='unknown', Content_Range=f'bytes {start}-{len(DATA) - 1}/*')
    else:
      self.answer(DATA, length='unknown')

  def kept_open(self, start):
    self.good(start)
    self.server.stop.wait(5)

  def redirected(self, start):
    self.answer(b'', 302, Location='/good/a b.zip')

  def piecemeal(self, start):
    self.good(start, stop=start + 50_000)

  # Recover when asked again.

  def reset(self, start):
    self.good(start, stop=100_000 if self.first_time() else None)
    if self.first_time():
      self.server.stop.wait(0.2)  # what was sent must arrive before the reset
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
      self.connection.close()

  def busy(self, start):
    if self.first_time():
      self.answer(b'', 503, Retry_After='17')
    else:
      self.good(start)

  def no_range(self, start):
    if start:
      self.answer(b'', 416)
    else:
      self.good(start)

  def other_range(self, start):
    if start:
      self.answer(DATA[100:], 206, Content_Range=f'bytes 100-{len(DATA) - 1}/{len(DATA)}')
    else:
      self.good(start)

  def spoilt_range(self, start):
    self.good(start, data=bytes(len(DATA)), stop=100_000 if self.first_time() and not start else None)

  # Of no use.

  def missing(self, start):
    self.send_error(404)

  def forbidden(self, start):
    self.send_error(403)

  def long_busy(self, start):
    self.answer(b'', 429, Retry_After='3600')

  def always_busy(self, start):
    self.answer(b'', 429, Retry_After='Wed, 21 Oct 2015 07:28:00 GMT')

  def accepted(self, start):
    self.answer(b'', 202)

  def loop(self, start):
    self.answer(b'', 302, Location=self.path)

  def page(self, start):
    self.answer(b'<p>Virus scan warning</p>', kind='Text/HTML; charset=utf-8')

  def disguised_page(self, start):
    self.answer(b'\n' + QUOTA, length='unknown')

  def drive(self, start):
    self.answer(QUOTA, kind='text/html')

  def wrong(self, start):
    self.answer(bytes(len(DATA)))

  def short(self, start):
    self.answer(DATA[:-1])

  def long(self, start):
    self.answer(DATA + b'more')

  def endless(self, start):
    self.answer(DATA + b'more', length='unknown')

  def cut(self, start):
    self.answer(DATA[:100_000], length=len(DATA))

  def empty(self, start):
    self.answer(b'', length=len(DATA))

  def cut_chunk(self, start):
    self.answer(b'40000\r\n' + DATA[:100_000], length='unknown', Transfer_Encoding='chunked')

  def stalled(self, start):
    self.answer(DATA[:100_000], length=len(DATA))
    self.server.stop.wait(5)

  def silent(self, start):
    self.server.stop.wait(5)

  def dripping(self, start):
    self.answer(DATA[:1], length=len(DATA))
    self.drip(1000)

  def dripping_header(self, start):
    self.wfile.write(b'HTTP/1.0 200 OK\r\nContent-')
    self.drip(1000)

  def drip(self, count):
    for _ in range(count):
      if self.server.stop.wait(0.05):
        break
      try:
        self.wfile.write(b'x')
      except OSError:
        break

  def interrupted(self, start):
    self.good(start, stop=100_000)
    while not self.server.part.stat().st_size:
      self.server.stop.wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    self.server.stop.wait(5)

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.requests, server.encodings, server.slept, server.stop = [], [], [], threading.Event()
  monkeypatch.setattr(download.time, 'sleep', server.slept.append)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield server
  server.stop.set()
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(download, '_TIMEOUT', 0.2)
  monkeypatch.setattr(download, '_WAITS', (1,))


def fetch(server, folder, *behaviours, **published):
  urls = tuple(f'http://127.0.0.1:{server.server_port}/{behaviour}' for behaviour in behaviours)
  return download.fetch(download.Remote('x.zip', urls, **published or {'sha256': SHA256, 'size': len(DATA)}), folder)


def names(folder):
  return [path.name for path in folder.iterdir()]


# Every way to describe DATA.
PUBLISHED = {
  'sha256 and size': {'sha256': SHA256, 'size': len(DATA)},
  'sha256': {'sha256': SHA256.upper()},
  'md5': {'md5': MD5},
  'md5 and size': {'md5': MD5, 'size': len(DATA)},
  'sha256 rather than md5': {'sha256': SHA256, 'md5': '0' * 32},
  'size': {'size': len(DATA)},
}


@pytest.mark.parametrize('published', PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize('behaviour', ['good', 'without-range', 'total-unknown', 'length-unknown', 'redirected'])
@pytest.mark.parametrize('there', [0, 123_456])
def test_good_file_arrives_whole(server, tmp_path, behaviour, published, there):
  (tmp_path / 'new/folder').mkdir(parents=True)
  (tmp_path / 'new/folder/x.zip.part').write_bytes(DATA[:there])
  path = fetch(server, str(tmp_path / 'new/folder'), behaviour, **published)
  assert path == tmp_path / 'new/folder/x.zip' and path.read_bytes() == DATA
  assert names(path.parent) == ['x.zip']
  resumed = there and list(published) != ['size']
  assert {span for _, span in server.requests} == {'bytes=123456-' if resumed else None}
  assert set(server.encodings) == {'identity'} and not server.slept


def test_folder_is_made(server, tmp_path, monkeypatch):
  assert fetch(server, tmp_path / 'new/folder', 'good').read_bytes() == DATA
  monkeypatch.chdir(tmp_path)
  assert fetch(server, '', 'good').read_bytes() == DATA


def test_file_that_is_there_stays(server, tmp_path, monkeypatch):
  (tmp_path / 'x.zip').write_text('mine')
  monkeypatch.setattr(download, 'locked', None)  # the folder may be read-only
  fetch(server, tmp_path, 'good')
  assert (tmp_path / 'x.zip').read_text() == 'mine' and names(tmp_path) == ['x.zip'] and not server.requests


def test_connection_kept_open_is_no_stall(server, tmp_path, monkeypatch):
  monkeypatch.setattr(download, '_TIMEOUT', 2)
  fetch(server, tmp_path, 'kept-open', sha256=SHA256)
  assert len(server.requests) == 1


def test_mirrors_and_hash_or_size_must_be_given(server, tmp_path):
  for behaviours, published in [(['good'], {'md5': ''}), ([], {'md5': MD5})]:
    with pytest.raises(ValueError, match=r'x\.zip has no mirror, or neither hash nor size'):
      fetch(server, tmp_path, *behaviours, **published)
  assert not names(tmp_path)


@pytest.mark.parametrize(
  ('url', 'asked'),
  [
    ('good/The Eiffel Tower.npy', '/good/The%20Eiffel%20Tower.npy'),
    ('good/garçon.npy', '/good/gar%C3%A7on.npy'),
    ('good/The%20Eiffel%20Tower.npy', '/good/The%20Eiffel%20Tower.npy'),
    ('good/download?id=ID&export=download&confirm=t', '/good/download?id=ID&export=download&confirm=t'),
  ],
)
def test_urls_are_quoted(server, tmp_path, url, asked):
  assert fetch(server, tmp_path, url).read_bytes() == DATA
  assert server.requests == [(asked, None)]


FAULTS = {
  'missing': 'HTTP 404 Not Found',
  'forbidden': 'HTTP 403 Forbidden',
  'always-busy': 'HTTP 429 Too Many Requests',
  'long-busy': 'HTTP 429 Too Many Requests, asks to wait 3600 s',
  'accepted': 'HTTP 202 Accepted',
  'loop': 'HTTP 302 .* infinite loop',
  'page': 'is a web page, not the file',
  'disguised-page': "is a web page 'Google Drive - Quota exceeded', not the file",
  'wrong': 'has 300000 bytes with a wrong SHA256',
  'short': 'has 299999 bytes, not 300000',
  'long': 'has 300004 bytes, not 300000',
  'endless': 'has more than 300000 bytes',
  'cut': 'ended after 100000 of 300000 bytes',
  'cut-chunk': 'IncompleteRead',
  'empty': 'ended after 0 of 300000 bytes',
  'stalled': 'no answer for 0.2 s',
  'silent': 'no answer for 0.2 s',
  'dripping': r'is too slow \(\d bytes in 0 s\)',
  'dripping-header': 'no answer for 0.2 s',
}
AGAIN = ('always-busy', 'cut', 'cut-chunk', 'empty', 'stalled', 'silent', 'dripping', 'dripping-header')


@pytest.mark.parametrize('fault', FAULTS)
def test_every_fault_is_one_line_and_the_next_mirror_takes_over(server, tmp_path, impatient, fault):
  with pytest.raises(UserError, match=f'127.0.0.1:{server.server_port}: {FAULTS[fault]}') as error:
    fetch(server, tmp_path, fault)
  message, path = str(error.value), tmp_path / 'x.zip'
  assert '\n' not in message and len(message) < 500
  assert message.endswith(
    f'): open http://127.0.0.1:{server.server_port}/{fault} in a browser, sign in if it asks, and put the file at '
    f'{path}, or run again to resume'
  )
  assert names(tmp_path) == ['x.zip.part']
  kept = path.with_name('x.zip.part').stat().st_size
  assert (kept > 0) == (fault in ('cut', 'cut-chunk', 'stalled', 'endless'))  # a wrong file does not stay
  if fault != 'loop':
    assert len(server.requests) == (2 if fault in AGAIN else 1)

  assert fetch(server, tmp_path, fault, 'good').read_bytes() == DATA
  assert names(tmp_path) == ['x.zip']


def test_all_mirrors_are_named_and_the_browser_gets_the_one_it_can_open(server, tmp_path):
  drive = 'drive/download?id=ID&export=download&confirm=t'
  with pytest.raises(UserError) as error:
    fetch(server, tmp_path, 'missing', drive, 'forbidden')
  here = f'127.0.0.1:{server.server_port}'
  assert str(error.value) == (
    f"cannot download x.zip ({here}: HTTP 404 Not Found; {here}: is a web page 'Google Drive - Quota exceeded', not "
    f'the file; {here}: HTTP 403 Forbidden): open http://{here}/{drive} in a browser, sign in if it asks, and put the '
    f'file at {tmp_path}/x.zip, or run again to resume'
  )


def test_refused_mirror_may_do_in_a_browser(server, tmp_path):
  with pytest.raises(UserError, match=r'open http://[\d.:]*/forbidden in a browser'):
    fetch(server, tmp_path, 'missing', 'forbidden')


def test_file_is_on_the_disk_before_it_has_its_name(server, tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(os, 'fsync', lambda file: seen.append((names(tmp_path), os.fstat(file).st_size)))
  fetch(server, tmp_path, 'good')
  assert seen == [(['x.zip.part'], len(DATA))]


@pytest.mark.parametrize('published', [PUBLISHED[key] for key in ('sha256 and size', 'sha256', 'md5')])
def test_complete_part_needs_no_request(server, tmp_path, published):
  (tmp_path / 'x.zip.part').write_bytes(DATA)
  assert fetch(server, tmp_path, 'good', **published).read_bytes() == DATA
  assert not server.requests and names(tmp_path) == ['x.zip']


@pytest.mark.parametrize('size', [len(DATA), None])
@pytest.mark.parametrize('part', [1000, len(DATA), len(DATA) + 1])
@pytest.mark.parametrize('behaviour', ['good', 'without-range', 'no-range', 'other-range', 'length-unknown'])
def test_wrong_part_does_not_spoil_a_good_mirror(server, tmp_path, behaviour, part, size):
  (tmp_path / 'x.zip.part').write_bytes(bytes(part))
  assert fetch(server, tmp_path, behaviour, sha256=SHA256, size=size).read_bytes() == DATA
  assert len(server.requests) <= 2


@pytest.mark.parametrize('behaviour', ['no-range', 'other-range', 'spoilt-range'])
def test_mirror_that_cannot_resume_starts_over_once(server, tmp_path, behaviour):
  (tmp_path / 'x.zip.part').write_bytes(DATA[:1000])
  assert fetch(server, tmp_path, behaviour).read_bytes() == DATA
  assert [span for _, span in server.requests] == ['bytes=1000-', None]


def test_wrong_bytes_after_an_interruption_start_over(server, tmp_path):
  assert fetch(server, tmp_path, 'spoilt-range').read_bytes() == DATA
  assert [span for _, span in server.requests] == [None, 'bytes=100000-', None]


def test_without_a_hash_mirrors_are_not_mixed(server, tmp_path, impatient):
  (tmp_path / 'x.zip.part').write_bytes(bytes(1000))
  assert fetch(server, tmp_path, 'cut', 'good', size=len(DATA)).read_bytes() == DATA
  assert [span for _, span in server.requests] == [None, 'bytes=100000-', None]


@pytest.mark.parametrize('fault', ['page', 'drive', 'short', 'missing', 'accepted'])
def test_useless_answer_does_not_cost_the_part(server, tmp_path, fault):
  (tmp_path / 'x.zip.part').write_bytes(DATA[:1000])
  fetch(server, tmp_path, fault, 'good')
  assert server.requests == [(f'/{fault}', 'bytes=1000-'), ('/good', 'bytes=1000-')]


def test_same_mirror_is_asked_again(server, tmp_path):
  assert fetch(server, tmp_path, 'reset').read_bytes() == DATA
  assert len(server.requests) == 2 and server.slept == [download._WAITS[0]]


def test_retry_after_is_honoured(server, tmp_path):
  assert fetch(server, tmp_path, 'busy').read_bytes() == DATA
  assert len(server.requests) == 2 and server.slept == [17]


def test_waits_grow(server, tmp_path):
  with pytest.raises(UserError, match='HTTP 429'):
    fetch(server, tmp_path, 'always-busy')
  assert server.slept == [1, 5, 20]


def test_progress_renews_the_patience_and_nothing_is_hashed_twice(server, tmp_path, monkeypatch):
  monkeypatch.setattr(download, '_PROGRESS', 50_000)
  new, hashed = hashlib.new, []

  class Digest:
    def __init__(self, *args, **kwargs):
      self.digest = new(*args, **kwargs)

    def update(self, block):
      hashed.append(len(block))
      self.digest.update(block)

    def hexdigest(self):
      return self.digest.hexdigest()

  monkeypatch.setattr(hashlib, 'new', Digest)
  (tmp_path / 'x.zip.part').write_bytes(DATA[:1000])
  assert fetch(server, tmp_path, 'piecemeal').read_bytes() == DATA
  assert len(server.requests) == 6 and set(server.slept) == {download._WAITS[0]}
  assert sum(hashed) == len(DATA)


def test_interrupted_download_is_resumed(server, tmp_path, monkeypatch):
  server.part = tmp_path / 'x.zip.part'
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      fetch(server, tmp_path, 'interrupted')
  finally:
    signal.signal(signal.SIGINT, handler)
  assert names(tmp_path) == ['x.zip.part']
  there = server.part.stat().st_size
  assert there > 0 and server.part.read_bytes() == DATA[:there]
  assert fetch(server, tmp_path, 'good').read_bytes() == DATA
  assert server.requests[1] == ('/good', f'bytes={there}-')


def test_refused_connection(tmp_path, monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  with socket.socket() as taken:  # bound but not listening: connections are refused
    taken.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{taken.getsockname()[1]}/x.zip'
    with pytest.raises(UserError, match='Connection refused'):
      download.fetch(download.Remote('x.zip', (url,), SHA256), tmp_path)
  assert not (tmp_path / 'x.zip').exists()


def test_no_network(tmp_path, monkeypatch):
  def getaddrinfo(*args):
    raise socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution')

  monkeypatch.setenv('no_proxy', '*')
  monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
  urls = ('http://a.example/x.zip', 'http://b.example/x.zip')
  reason = r'Temporary failure in name resolution \(no network\?\)'
  with pytest.raises(UserError, match=rf'\(a.example: {reason}; b.example: {reason}\): open http://a.example/x.zip'):
    download.fetch(download.Remote('x.zip', urls, SHA256), tmp_path)
  assert not (tmp_path / 'x.zip').exists()


@pytest.mark.parametrize('size', [len(DATA), None])
def test_room_is_checked_before(server, tmp_path, monkeypatch, size):
  Usage = collections.namedtuple('Usage', 'total used free')
  monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: Usage(10**9, 10**9 - 200_000, 200_000))
  with pytest.raises(UserError) as error:
    fetch(server, tmp_path, 'good', 'good', sha256=SHA256, size=size)
  assert str(error.value) == (
    f'cannot write {tmp_path}/x.zip: 0.3 MB more are needed, 0.2 MB are free; make room there, or choose another '
    'folder with --data_dir'
  )
  assert len(server.requests) == 1 and not (tmp_path / 'x.zip.part').stat().st_size
  (tmp_path / 'x.zip.part').write_bytes(DATA[:100_000])
  assert fetch(server, tmp_path, 'good').read_bytes() == DATA


def test_disk_that_fills_up(server, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'cannot write .*x.zip: File too large; make room there, or .*--data_dir'):
      fetch(server, tmp_path, 'good', 'good')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert len(server.requests) == 1  # another mirror would not help
  assert names(tmp_path) == ['x.zip.part']
  assert fetch(server, tmp_path, 'good').read_bytes() == DATA
  assert server.requests[1][1]  # resumed


def test_folder_that_cannot_be_written(server, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'cannot write .*file/data/x.zip: Not a directory; choose another .*--data_dir'):
    fetch(server, tmp_path / 'file/data', 'good')
  assert not server.requests


def test_of_several_processes_one_downloads(server, tmp_path):
  def run():
    try:
      fetch(server, tmp_path, 'good')
    except Exception as error:
      errors.append(error)

  errors = []
  threads = [threading.Thread(target=run) for _ in range(3)]  # locks are held per open file, so threads will do
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors and len(server.requests) == 1
  assert names(tmp_path) == ['x.zip']


def test_without_locks_nobody_shares_a_part(server, tmp_path, monkeypatch):
  def flock(file, kind):
    raise OSError(38, 'Function not implemented')

  monkeypatch.setattr('fcntl.flock', flock)
  (tmp_path / 'x.zip.part').write_bytes(bytes(1000))  # another process is at it
  with pytest.raises(UserError, match='ended after'):
    fetch(server, tmp_path, 'cut')
  assert names(tmp_path) == ['x.zip.part']
  assert fetch(server, tmp_path, 'good').read_bytes() == DATA
  assert (tmp_path / 'x.zip.part').read_bytes() == bytes(1000)
