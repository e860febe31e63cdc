"""Makes batches ahead of the step that takes them."""

import queue
import threading


def prefetch(make_batch, steps, depth=2):
  """Yields (step, make_batch(step)) in order, made by a thread that stays up to `depth` batches ahead.

  An exception of `make_batch` is raised here; closing the generator ends the thread.
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
    while (item := batches.get()) is not None:
      step, batch, error = item
      if error is not None:
        raise error
      yield step, batch
  finally:
    closed.set()
    thread.join()
