"""Makes batches ahead of the step that takes them."""

import queue
import threading
import time


def prefetch(make_batch, steps, waited=lambda seconds: None, depth=8):
  """Yields (step, make_batch(step)) in order, made by a thread that stays up to `depth` batches ahead.

  An exception of `make_batch` is raised here; closing the generator ends the thread.

  Args:
    make_batch: step -> batch.
    steps: an iterable of them.
    waited: is told, for each batch, the seconds that the caller waited for it. The device was idle for want of it at
      most as long, since it may have had steps left to do.
    depth: enough that a batch in between that takes many times as long (the first of a block of episodes) is not
      waited for.
  """
  batches = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(item):
    while not closed.is_set():
      try:
        return batches.put(item, timeout=0.1)
      except queue.Full:
        continue

  def work():
    try:
      for step in steps:
        if closed.is_set():
          return
        put((step, make_batch(step), None))
    except BaseException as error:
      put((None, None, error))
    else:
      put(None)

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    while True:
      start = time.perf_counter()
      item = batches.get()
      if item is None:
        return
      waited(time.perf_counter() - start)
      step, batch, error = item
      if error is not None:
        raise error
      yield step, batch
  finally:
    closed.set()
    thread.join()
