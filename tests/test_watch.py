"""Connections of three processes, in threads of one."""

import concurrent.futures
import contextlib
import json
import os
import socket
import threading
import time

import pytest

from metajax import watch

# An exit that is only noted ends its thread.
pytestmark = [
  pytest.mark.smoke,
  pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning'),
]


@pytest.fixture
def exits(monkeypatch):
  """Exits are noted instead: a queue of (status, text)."""
  noted = watch.queue.SimpleQueue()

  def note(status, text=None):
    noted.put((status, text))
    raise SystemExit  # an exit does not return

  monkeypatch.setattr(watch, 'exit_at_once', note)
  monkeypatch.setattr(watch, 'on_abort', lambda function: None)
  monkeypatch.setattr(watch, '_LEAVE_SECONDS', 0.2)  # the others stay, as their exits are only noted
  monkeypatch.setattr(watch.tqdm, 'write', lambda text, file: None)
  yield noted
  for one in made:
    one._over = True
    die(one)
  made.clear()
  for thread in threading.enumerate():
    if thread.name == 'watch':
      thread.join(60)


made = []  # watches whose threads must end with their test


def meet(processes=3, before=lambda port: None):
  """The watches of all processes."""
  door = watch.listen('127.0.0.1')
  port = door.getsockname()[1]
  with concurrent.futures.ThreadPoolExecutor(processes) as pool:
    first = pool.submit(watch.Watch, 0, processes, '127.0.0.1', port, door)
    before(port)
    others = [pool.submit(watch.Watch, k, processes, '127.0.0.1', port) for k in range(1, processes)]
    made.extend(future.result(60) for future in (first, *others))
  return list(made)


def die(one):
  """What the operating system does to the connections of a process that is killed."""
  for peer in list(one._peers.values()):
    with contextlib.suppress(OSError):
      peer._connection.shutdown(socket.SHUT_RDWR)


def test_values_arrive_in_order_and_all_finish(exits):
  watches = meet()
  for value in ({'a': [1, 'ü']}, None, 2):
    watches[0].send(value)
  assert [[w.receive() for _ in range(3)] for w in watches[1:]] == [[{'a': [1, 'ü']}, None, 2]] * 2
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    assert all(future.result(60) is None for future in [pool.submit(w.finish) for w in watches])
  for one in watches:
    die(one)  # may end in any order now
  assert exits.empty()


@pytest.mark.parametrize('number', [0, 1, 2])
def test_who_dies_ends_all_others_at_once_and_one_line_says_who(exits, number, monkeypatch):
  told = []
  monkeypatch.setattr(watch.tqdm, 'write', lambda text, file: told.append(text))
  watches = meet()
  die(watches[number])
  ended = [exits.get(timeout=60) for _ in range(3 if number else 2)]  # what has died here notices, too
  assert {status for status, _ in ended} == {watch.LOST}
  if number == 0:  # there is nobody to agree with: each says so; what has died here thinks it of the others
    told = [text for _, text in ended if text and 'process 0' in text]
    assert all(line.startswith('metajax: process 0 of 3 (on 127.0.0.1) has died') for line in told) and told
  else:
    assert [line.partition(' (')[0] for line in told] == [f'metajax: process {number} of 3']


def test_the_last_to_come_is_waited_for(exits, monkeypatch):
  """Who waits with process 0 hears of it all the while."""
  monkeypatch.setattr(watch, '_BEAT_SECONDS', 0.05)
  door = watch.listen('127.0.0.1')
  port = door.getsockname()[1]
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    first = pool.submit(watch.Watch, 0, 3, '127.0.0.1', port, door)
    second = pool.submit(watch.Watch, 1, 3, '127.0.0.1', port).result(60)
    heard = second._peers[0].heard
    while second._peers[0].heard - heard < 0.5:
      time.sleep(0.01)
    made.extend([second, pool.submit(watch.Watch, 2, 3, '127.0.0.1', port).result(60), first.result(60)])
  assert exits.empty()


def test_a_failure_after_the_end_is_told_by_itself(exits):
  watches = meet(2)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert all(future.result(60) is None for future in [pool.submit(w.finish) for w in watches])
    claim = pool.submit(watches[1]._claim, 7)
    die(watches[0])
    assert claim.result(60) is True
  assert watches[1]._claim(7) is True  # also when process 0 has been gone for long


def test_a_process_ends_where_it_cannot_print(monkeypatch):
  ended = []
  monkeypatch.setattr(watch.os, '_exit', ended.append)
  for stream in (None, open(os.devnull)):  # noqa: SIM115
    with monkeypatch.context() as patch:
      patch.setattr(watch.sys, 'stderr', stream)
      patch.setattr(watch.sys, 'stdout', stream)
      watch.exit_at_once(3, 'a line')
  assert ended == [3, 3]


@pytest.mark.parametrize('number', [0, 2])
def test_the_first_failure_gives_all_its_status_and_is_told_once(exits, number, monkeypatch):
  told = []
  monkeypatch.setattr(watch.tqdm, 'write', lambda text, file: told.append(text))
  watches = meet()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pool.submit(watches[number].fail, 7, 'why', False)
    assert [exits.get(timeout=60)[0] for _ in range(3)] == [7, 7, 7]
  assert told == ['why']


def test_two_failures_at_once_have_one_status(exits):
  watches = meet()
  claims = [w._claim(status) for w, status in zip(watches, (5, 6, 7), strict=True)]
  assert claims == [True, False, False]


def test_a_machine_that_is_gone_is_noticed_by_its_silence(exits, monkeypatch):
  monkeypatch.setattr(watch, '_BEAT_SECONDS', 0.05)
  watches = meet(2)
  monkeypatch.setattr(watch, 'SILENT_SECONDS', 0.3)
  watches[1]._peers[0].send = lambda message: None
  status, _ = exits.get(timeout=60)
  assert status == watch.LOST


def test_strangers_are_turned_away(exits):
  def strangers(port):
    for hello in (b'GET / HTTP/1.1\n', b'[]\n', b'\xff\n', b'{"index": 7, "processes": 3, "host": "x"}\n', b'x' * 5000):
      with socket.create_connection(('127.0.0.1', port)) as stranger:
        stranger.sendall(hello)
        stranger.settimeout(60)
        with contextlib.suppress(ConnectionResetError):  # it closed without reading to the end
          assert stranger.recv(100) == b''
    for processes in (2, 4):  # of another run
      with socket.create_connection(('127.0.0.1', port)) as stranger:
        stranger.sendall(json.dumps({'index': 1, 'processes': processes, 'host': 'x'}).encode() + b'\n')
        assert stranger.recv(100) == b''

  watches = meet(before=strangers)
  watches[0].send('all here')
  assert [w.receive() for w in watches[1:]] == ['all here'] * 2


def test_only_this_machine_reaches_a_door_on_loopback():
  with watch.listen('localhost') as door:
    assert door.getsockname()[0] == '127.0.0.1'
  with watch.listen('elsewhere') as door:
    assert door.getsockname()[0] in ('::', '0.0.0.0')
    with socket.create_connection(('127.0.0.1', door.getsockname()[1])):
      pass
