import hashlib
import http.server
import re
import resource
import socket
import threading

import numpy as np
import pytest

from metajax.data import download
from metajax.errors import UserError

DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves DATA, misbehaving as the path says; a server remembers (path, Range) of its requests."""

  def do_GET(self):
    self.server.requests.append((self.path, self.headers.get('Range')))
    start = int(re.search(r'\d+', self.headers.get('Range', '0'))[0])
    getattr(self, self.path.strip('/').replace('-', '_'))(start)

  def answer(self, body, status=200, kind='application/zip', length=None, extra=()):
    self.send_response(status)
    self.send_header('Content-Type', kind)
    if length != 'unknown':
      self.send_header('Content-Length', str(length or len(body)))
    for name, value in extra:
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  def good(self, start):
    if start:
      span = ('Content-Range', f'bytes {start}-{len(DATA) - 1}/{len(DATA)}')
      self.answer(DATA[start:], 206, extra=[span])
    else:
      self.answer(DATA)

  def without_range(self, start):
    self.answer(DATA)

  def cut(self, start):
    self.answer(DATA[:100_000], length=len(DATA))

  def missing(self, start):
    self.send_error(404)

  def page(self, start):
    self.answer(b'<p>Virus scan warning</p>', kind='text/html; charset=utf-8')

  def disguised_page(self, start):
    self.answer(b'\n<!DOCTYPE html><html>Quota exceeded</html>', length='unknown')

  def wrong(self, start):
    self.answer(bytes(len(DATA)))

  def short(self, start):
    self.answer(DATA[:-1])

  def endless(self, start):
    self.answer(DATA + b'more', length='unknown')

  def stalled(self, start):
    self.answer(DATA[:100_000], length=len(DATA))
    self.server.stop.wait(5)

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.requests, server.stop = [], threading.Event()
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield server
  server.stop.set()
  server.shutdown()
  thread.join()
  server.server_close()


def fetch(server, path, *behaviours):
  urls = [f'http://127.0.0.1:{server.server_port}/{behaviour}' for behaviour in behaviours]
  download.fetch(urls, path, sha256=SHA256, size=len(DATA))


def test_good_file_arrives_whole(server, tmp_path):
  fetch(server, tmp_path / 'new/folder/x.zip', 'good')
  assert (tmp_path / 'new/folder/x.zip').read_bytes() == DATA
  assert [path.name for path in (tmp_path / 'new/folder').iterdir()] == ['x.zip']


def test_file_that_is_there_stays(server, tmp_path):
  (tmp_path / 'x.zip').write_text('mine')
  fetch(server, tmp_path / 'x.zip', 'good')
  assert (tmp_path / 'x.zip').read_text() == 'mine' and not server.requests


FAULTS = {
  'missing': 'HTTP 404',
  'page': 'web page',
  'disguised-page': 'web page',
  'wrong': 'SHA-256',
  'short': 'has 299999 bytes',
  'endless': 'more than 300000 bytes',
  'cut': 'ended after 100000 of 300000',
  'stalled': 'no answer for 0.3 s',
}


@pytest.mark.parametrize('fault', FAULTS)
def test_next_mirror_takes_over(server, tmp_path, monkeypatch, fault):
  monkeypatch.setattr(download, '_TIMEOUT', 0.3)
  fetch(server, tmp_path / 'x.zip', fault, 'good')
  assert (tmp_path / 'x.zip').read_bytes() == DATA
  assert [path.name for path in tmp_path.iterdir()] == ['x.zip']


@pytest.mark.parametrize('fault', FAULTS)
def test_every_fault_is_one_line(server, tmp_path, monkeypatch, fault):
  monkeypatch.setattr(download, '_TIMEOUT', 0.3)
  with pytest.raises(UserError, match=FAULTS[fault]) as error:
    fetch(server, tmp_path / 'x.zip', fault)
  message = str(error.value)
  assert '\n' not in message and f'/{fault}' in message and str(tmp_path / 'x.zip') in message
  assert not (tmp_path / 'x.zip').exists()
  kept = (tmp_path / 'x.zip.part').exists()
  assert kept == (fault in ('cut', 'stalled', 'endless'))  # what can be continued stays, a wrong file does not


def test_all_mirrors_are_named(server, tmp_path):
  with pytest.raises(UserError, match=r'HTTP 404.*web page'):
    fetch(server, tmp_path / 'x.zip', 'missing', 'page')


def test_part_is_continued(server, tmp_path):
  (tmp_path / 'x.zip.part').write_bytes(DATA[:123_456])
  fetch(server, tmp_path / 'x.zip', 'good')
  assert server.requests == [('/good', 'bytes=123456-')]
  assert (tmp_path / 'x.zip').read_bytes() == DATA


def test_part_is_dropped_where_the_server_does_not_resume(server, tmp_path):
  (tmp_path / 'x.zip.part').write_bytes(DATA[:123_456])
  fetch(server, tmp_path / 'x.zip', 'without-range')
  assert (tmp_path / 'x.zip').read_bytes() == DATA


def test_bad_part_does_not_spoil_a_good_mirror(server, tmp_path):
  for part in (bytes(1000), bytes(len(DATA)), bytes(len(DATA) + 1)):
    (tmp_path / 'x.zip.part').write_bytes(part)
    fetch(server, tmp_path / 'x.zip', 'good')
    assert (tmp_path / 'x.zip').read_bytes() == DATA
    (tmp_path / 'x.zip').unlink()


def test_no_network(tmp_path, monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  with socket.socket() as taken:  # bound but not listening: connections are refused
    taken.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{taken.getsockname()[1]}/x.zip'
    with pytest.raises(UserError, match='refused'):
      download.fetch([url], tmp_path / 'x.zip', sha256=SHA256, size=len(DATA))
  assert not list(tmp_path.iterdir())


def test_full_disk(server, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'cannot write .*x.zip: File too large; .*--data_dir'):
      fetch(server, tmp_path / 'x.zip', 'good', 'good')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert len(server.requests) == 1  # another mirror would not help


def test_of_several_processes_one_downloads(server, tmp_path):
  def run():
    try:
      fetch(server, tmp_path / 'x.zip', 'good')
    except Exception as error:
      errors.append(error)

  errors = []
  threads = [threading.Thread(target=run) for _ in range(3)]  # locks are held per open file, so threads will do
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors and len(server.requests) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['x.zip']
