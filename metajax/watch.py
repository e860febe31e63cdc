"""The processes of a run watch one another: who fails or dies ends all, with one line and one exit status.

Process 0 listens at the coordinator's port; each other process holds one TCP connection to it for as long as the run
lasts. The operating system closes the connection of a process that dies, however it dies, so the others know within a
moment; a machine that is gone is noticed by its silence. Messages are lines of JSON.
"""

import contextlib
import ctypes
import json
import os
import platform
import queue
import signal
import socket
import sys
import threading
import time

from tqdm import tqdm

LOST = 3  # exit status: another process is missing or gone; the same command resumes the run
SILENT_SECONDS = 30  # without a sign of life, after which a process counts as lost
_BEAT_SECONDS = 1  # between two signs of life
_LEAVE_SECONDS = 5  # that the others have to leave before process 0, without which JAX aborts them, does
_ABORT_SECONDS = 5  # that an abort waits for the news that another process has died
_RETRY_SECONDS = 0.2  # between two attempts to reach process 0, which may not be there yet
_LONGEST_HELLO = 1000  # bytes that a stranger may send
_WELCOME = b'"welcome"\n'


def exit_at_once(status, text=None):
  """Ends this process, whatever its threads wait for, and whether or not it can still print."""
  _print(text)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(status)


def _print(text):
  if text:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, a full disk, none at all
      tqdm.write(text, file=sys.stderr)  # above the progress bar, if there is one


def listen(host, port=0):
  """A socket that listens at a port, by default at a free one.

  Args:
    host: this machine's name; if only the machine itself knows it by that name, nobody else can connect.
    port: int.

  Raises:
    OSError: the port is in use, or not allowed.
  """
  if host in ('localhost', '127.0.0.1'):
    return socket.create_server(('127.0.0.1', port))
  if host == '::1' or socket.has_dualstack_ipv6():
    local = host == '::1'
    return socket.create_server((host if local else '', port), family=socket.AF_INET6, dualstack_ipv6=not local)
  return socket.create_server(('', port))


class Watch:
  """This process's end of the connections, made when the constructor returns; it waits for ever.

  Args:
    index: of this process.
    processes: how many there are.
    host: where process 0 is.
    port: where process 0 listens.
    door: of process 0, what `listen` returned.
  """

  def __init__(self, index, processes, host, port, door=None):
    self.index, self._processes = index, processes
    self._peers = {}  # index -> _Peer; the others know process 0 alone
    self._values, self._verdicts = queue.SimpleQueue(), queue.SimpleQueue()
    self._changed = threading.Condition()  # guards what follows
    self._done = set()  # indices of the processes that are done
    self._ending = False  # the first failure is known, and all are on their way out
    self._over = False  # all are done: connections may close
    on_abort(lambda: self._over or time.sleep(_ABORT_SECONDS))
    _start_thread(self._beat)  # already while others are still to come
    if index:
      self._watch_over(0, _knock(host, port, {'index': index, 'processes': processes, 'host': platform.node()}))
    else:
      with door:
        while len(self._peers) < processes - 1:
          self._admit(door.accept()[0])

  def _admit(self, connection):
    """Lets one of the others in; whoever is not one of them is turned away."""
    connection.settimeout(_BEAT_SECONDS)  # whoever is slower tries again
    peer = _Peer(connection)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      hello = json.loads(peer.lines.readline(_LONGEST_HELLO))
      index = hello['index']
      if hello['processes'] == self._processes and index in range(1, self._processes) and index not in self._peers:
        connection.settimeout(None)
        peer.host = hello['host']
        peer.send('welcome')
        self._watch_over(index, peer)
        return
    peer.close()

  def _watch_over(self, other, peer):
    self._peers[other] = peer
    _start_thread(self._read, other, peer)

  def send(self, value):
    """Sends what JSON can hold from process 0 to all others, which `receive` it."""
    self._tell({'value': value})
    return value

  def receive(self):
    return self._values.get()

  def finish(self):
    """Waits until all processes are done; from then on they may end in any order."""
    with self._changed:
      self._done.add(self.index)
      if self.index:
        self._tell({'done': True})
      self._changed.wait_for(lambda: self._over or len(self._done) == self._processes)
      self._over = True
    if not self.index:
      self._tell({'done': True})

  def fail(self, status, text, by_device):
    """Ends all processes with an exit status; the first to fail prints its text on stderr.

    Args:
      status: int.
      text: str.
      by_device: the error came from a device, so another process may be lost: the watch is given time to see it.
    """
    if by_device:
      time.sleep(SILENT_SECONDS + 10 * _BEAT_SECONDS)
    elif self.index:  # what fails everywhere is for process 0 to say, which has the log
      time.sleep(3 * _BEAT_SECONDS)
    if not self._claim(status):
      time.sleep(SILENT_SECONDS)  # a thread ends this process
    self._leave(status, text)

  def _claim(self, status):
    """Whether this process is the first to fail, and so the one that says why."""
    if self.index:
      if not self._peers:  # process 0 is done and gone, or about to be reported as lost
        return True
      self._tell({'failed': status})
      return self._verdicts.get()
    with self._changed:
      first, self._ending = not self._ending, True
    return first

  def _leave(self, status, text=None):
    """Exits; process 0 after the others, which it tells to."""
    _print(text)
    with self._changed:
      self._ending = True
      if not self.index:
        self._tell({'end': status})
        self._changed.wait_for(lambda: not self._peers, _LEAVE_SECONDS)
    exit_at_once(status)

  def _tell(self, message):
    for peer in list(self._peers.values()):
      peer.send(message)

  def _beat(self):
    while not self._over:
      self._tell({'alive': True})
      time.sleep(_BEAT_SECONDS)
      for other, peer in list(self._peers.items()):
        # Process 0, which has the log, is given the time to be the first to say so.
        if time.monotonic() - peer.heard > SILENT_SECONDS + 2 * _BEAT_SECONDS * (self.index > 0):
          self._lose(other, peer)

  def _read(self, other, peer):
    """Acts on what another process says, until its connection closes."""
    with contextlib.suppress(OSError):
      for line in peer.lines:
        if not line.endswith(b'\n'):
          break  # cut off by its death
        peer.heard = time.monotonic()
        self._act(other, peer, json.loads(line))
    with self._changed:
      self._peers.pop(other, None)
      self._verdicts.put(True)  # whoever waits for the verdict of process 0 has to say why by itself
      self._changed.notify_all()
      expected = self._ending or self._over
    if not expected:
      self._lose(other, peer)

  def _act(self, other, peer, message):
    if 'value' in message:
      self._values.put(message['value'])
    elif 'claimed' in message:
      self._ending = message['claimed']  # then this process has something to say before it leaves
      self._verdicts.put(message['claimed'])
    elif 'done' in message:
      with self._changed:
        self._done.add(other)
        self._over = self._over or bool(self.index)
        self._changed.notify_all()
    elif 'end' in message and not self._ending:
      self._leave(message['end'])
    elif 'failed' in message and not self._over:
      first = self._claim(message['failed'])
      peer.send({'claimed': first})
      if first:
        _start_thread(self._leave, message['failed'])  # this one goes on reading, to see the others leave

  def _lose(self, other, peer):
    line = (
      f'metajax: process {other} of {self._processes} (on {peer.host}) has died or stopped responding, so the '
      'others stop too: run the same command again to resume from the last checkpoint'
    )
    if self.index:  # without process 0 there is nobody to ask
      exit_at_once(LOST, line)
    if self._claim(LOST):
      self._leave(LOST, line)


class _Peer:
  """One connection: lines in both directions."""

  def __init__(self, connection, host=''):
    self.host, self.heard = host, time.monotonic()
    self.lines = connection.makefile('rb')
    self._connection, self._sending = connection, threading.Lock()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

  def close(self):
    self.lines.close()
    self._connection.close()

  def send(self, message):
    with self._sending, contextlib.suppress(OSError):  # who reads from it sees that it is closed
      self._connection.sendall(json.dumps(message).encode() + b'\n')


def _knock(host, port, hello):
  """The connection to process 0, which is tried until it answers with a welcome."""
  while True:
    with contextlib.suppress(OSError):  # it is not there yet, or not free
      connection = socket.create_connection((host, port), timeout=SILENT_SECONDS)
      peer = _Peer(connection, host)
      peer.send(hello)
      if peer.lines.readline() == _WELCOME:
        connection.settimeout(None)
        return peer
      peer.close()  # another program, or itself: a port that nobody listens at may connect to its own caller
    time.sleep(_RETRY_SECONDS)


def _start_thread(function, *args):
  threading.Thread(target=function, args=args, name='watch', daemon=True).start()


def on_abort(function):
  """Calls `function` when this process is about to be aborted, if the platform can.

  JAX aborts in C++, past all of Python, when it meets the death of another process before the watch does.
  """
  with contextlib.suppress(TypeError, AttributeError, OSError):  # Windows
    library = ctypes.CDLL(None)
    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: function()))
    library.signal(signal.SIGABRT, _handlers[-1])


_handlers = []  # of C, which does not keep them alive
