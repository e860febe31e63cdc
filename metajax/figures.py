"""Figures of a run: learning curves, adaptation step by step, an episode, regression tasks.

Plain NumPy in, a PNG out. Figures are built without pyplot, so that no backend is chosen and no figure outlives its
function. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import EngFormatter, MaxNLocator

from metajax.files import write_atomically

BLUE, SKY, ORANGE, GREEN, RED = '#0072B2', '#56B4E9', '#E69F00', '#009E73', '#D55E00'
INK, GREY = '#222222', '#8A8A8A'
STYLE = {
  'font.family': 'DejaVu Sans',  # comes with matplotlib: the same everywhere
  'font.size': 11,
  'text.color': INK,
  'axes.edgecolor': GREY,
  'axes.labelcolor': INK,
  'axes.titlesize': 13,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.titlepad': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#E6E6E6',
  'grid.linewidth': 0.8,
  'xtick.color': GREY,
  'ytick.color': GREY,
  'xtick.labelcolor': INK,
  'ytick.labelcolor': INK,
  'lines.solid_capstyle': 'round',
  'legend.frameon': False,
  'figure.titlesize': 14,
  'figure.constrained_layout.h_pad': 0.12,  # inches
  'figure.constrained_layout.w_pad': 0.12,
  'figure.titleweight': 'bold',
}
SHOWN = 8  # at most so many support and so many query images of a class in an episode's grid


@matplotlib.rc_context(STYLE)
def contact_sheet(path, title, splits, classes=8, columns=12):
  """Draws sample images of each split, a class a row.

  Args:
    path: where the PNG goes.
    title: of the sheet.
    splits: split -> ClassTable; uint8 is shown as it is, other types are scaled to black and white. Without images
      (h, w, c) nothing is drawn.
    classes: rows of a split, at most; evenly spaced over its classes.
    columns: images of a class, at most; evenly spaced.
  """
  if any(t.images.ndim != 4 for t in splits.values()):
    return
  rows = {
    split: np.linspace(0, len(t.names) - 1, min(classes, len(t.names))).round().astype(int)
    for split, t in splits.items()
  }
  fig = Figure(figsize=(9.6, 1.2 + 0.62 * sum(map(len, rows.values()))), layout='constrained')
  fig.suptitle(title)
  heights = [len(of_split) for of_split in rows.values()]
  for ax, (split, t) in zip(
    fig.subplots(len(splits), height_ratios=heights, squeeze=False)[:, 0], splits.items(), strict=True
  ):
    picks = [np.linspace(0, t.counts[k] - 1, min(columns, t.counts[k])).round().astype(int) for k in rows[split]]
    images = [_grey_or_rgb(t.images[t.starts[k] + of_class]) for k, of_class in zip(rows[split], picks, strict=True)]
    images = [x / np.float32(255) for x in images] if t.images.dtype == np.uint8 else _scaled(*images)
    h, w = t.images.shape[1:3]
    gap = max(1, h // 14)
    sheet = np.ones((len(images) * (h + gap), columns * (w + gap), *images[0].shape[3:]), np.float32)
    for y, (k, of_class) in enumerate(zip(rows[split], images, strict=True)):
      for x, image in enumerate(of_class):
        sheet[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = np.rot90(image, t.turns[k])
    ax.imshow(sheet, cmap='gray', vmin=0, vmax=1, interpolation='none' if h >= 60 else 'nearest')
    ax.set_title(f'{split}: {len(t.names)} classes, {t.counts.sum()} images')
    ax.set_yticks(np.arange(len(rows[split])) * (h + gap) + h / 2, [_short(t.names[k]) for k in rows[split]])
    ax.set_xticks([])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
  _save(fig, path, dpi=100)


@matplotlib.rc_context(STYLE)
def learning_curves(path, records, names=('meta-train', 'meta-validation')):
  """Draws loss and accuracy against meta-updates, meta-training and meta-validation.

  Training has a running mean where there are enough records for one.

  Args:
    path: where the PNG goes.
    records: dicts with 'step' and any of 'train/loss', 'val/loss', 'train/accuracy', 'val/accuracy' (fractions), and
      'val/loss_ci95', 'val/accuracy_ci95' for the bands; in regression there is no accuracy, and no panel for it.
    names: of training and validation, for the legend.
  """
  quantities = (
    ['loss', 'accuracy'] if any(f'{s}/accuracy' in r for r in records for s in ('train', 'val')) else ['loss']
  )
  fig = Figure(figsize=(6.4 * len(quantities), 4.6), layout='constrained')
  handles = {}
  for ax, quantity in zip(fig.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
    scale = 100 if quantity == 'accuracy' else 1
    bounds = []
    steps, values = _series(records, f'train/{quantity}', scale)
    if len(steps):
      smooth, window = _running_mean(values)
      if window > 1:
        ax.plot(steps, values, color=SKY, linewidth=0.8, alpha=0.5)
      [line] = ax.plot(steps, smooth, color=BLUE, linewidth=2.2, marker=None if window > 1 else 'o', markersize=4.5)
      handles[f'{names[0]}, running mean of {window} records' if window > 1 else names[0]] = line
      bounds += [*smooth, *np.percentile(values, [1, 99])]  # a few spikes must not flatten the rest
    steps, values = _series(records, f'val/{quantity}', scale)
    if len(steps):
      half = dict(zip(*_series(records, f'val/{quantity}_ci95', scale), strict=True))
      half = np.array([half.get(step, 0.0) for step in steps])
      band = ax.fill_between(steps, values - half, values + half, color=ORANGE, alpha=0.3, linewidth=0)
      [line] = ax.plot(steps, values, color=RED, linewidth=1.8, marker='o', markersize=4.5)
      handles[f'{names[1]}, 95 % interval'] = (band, line)
      bounds += [*(values - half), *(values + half)]
    if bounds:
      low, high = min(bounds), max(bounds)
      pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
      ax.set_ylim(max(low - pad, min(low, 0)), min(high + pad, 101) if scale == 100 else high + pad)
    else:
      ax.text(0.5, 0.5, 'nothing recorded yet', transform=ax.transAxes, ha='center', color=GREY)
    ax.set(title=f'Query {quantity}', ylabel='accuracy (%)' if scale == 100 else 'loss')
    _count_meta_updates(ax)
  if handles:
    fig.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=2)
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def task_weights(path, records):
  """Draws what a task weighting did: its weights, how far it perturbed and moved them, and the values it compared.

  Args:
    path: where the PNG goes.
    records: dicts with 'step' and any of 'train/weights' (n,), 'train/weights_quantiles' (5,), 'train/gain',
      'train/radius', 'train/pair' (2,). Without weights nothing is drawn.
  """
  keys = ('train/weights', 'train/weights_quantiles', 'train/pair', 'train/gain', 'train/radius')
  found = {key: {r['step']: r[key] for r in records if key in r} for key in keys}
  weights, quantiles, pair, gain, radius = (np.array([v for _, v in sorted(found[key].items())]) for key in keys)
  steps = np.array(sorted(found[keys[0]] or found[keys[1]]))
  if not len(steps):
    return
  fig = Figure(figsize=(6.4 * (3 if len(pair) else 1), 4.6), layout='constrained')
  axes = fig.subplots(1, 3 if len(pair) else 1, squeeze=False)[0]
  axes[0].set(title='Weights', ylabel='w')
  if len(weights):
    colors = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, weights.shape[1]))
    for i, color in enumerate(colors):
      axes[0].plot(steps, weights[:, i], color=color, linewidth=1.4, label=f'$w_{{{i + 1}}}$')
    if weights.shape[1] <= SHOWN:
      _legend_below(axes[0])
  else:
    for (low, high), alpha, label in (((0, 4), 0.25, 'all'), ((1, 3), 0.5, 'half of them')):
      axes[0].fill_between(
        steps, quantiles[:, low], quantiles[:, high], color=SKY, alpha=alpha, linewidth=0, label=label
      )
    axes[0].plot(steps, quantiles[:, 2], color=BLUE, linewidth=2, label='median')
    _legend_below(axes[0])
  if len(pair):
    axes[1].set(title='Values of the pair')
    for side, (color, label) in enumerate(((BLUE, 'weights plus'), (RED, 'weights minus'))):
      smooth, window = _running_mean(pair[:, side])
      if window > 1:
        axes[1].plot(steps, pair[:, side], color=color, linewidth=1, alpha=0.35)
      axes[1].plot(steps, smooth, color=color, linewidth=2, label=label)
    axes[2].set(title='Gain and radius', yscale='log')
    axes[2].plot(steps, gain, color=GREEN, linewidth=2, label='gain')
    axes[2].plot(steps, radius, color=ORANGE, linewidth=2, label='radius')
    for ax in axes[1:]:
      _legend_below(ax)
  for ax in axes:
    _count_meta_updates(ax)
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def inner_lr(path, records):
  """Draws learned inner step sizes: a table of the last ones, a row a tensor, and their way there.

  White is what they began with; where signs differ, it is zero. Rows are in the order of the records' keys.

  Args:
    path: where the PNG goes.
    records: dicts with 'step' and 'train/inner_lr/TENSOR', each (inner steps,), or (1,) where a tensor has one for all
      steps. Without any nothing is drawn.
  """
  prefix = 'train/inner_lr/'
  names = dict.fromkeys(key for record in records for key in record if key.startswith(prefix))
  found = {name.removeprefix(prefix): _vectors(records, name) for name in names}
  if not found:
    return
  columns = max(values.shape[1] for _, values in found.values())
  table = np.stack([np.broadcast_to(values[-1], columns) for _, values in found.values()])
  start = np.median(np.concatenate([values[0] for _, values in found.values()]))
  center = 0.0 if (table < 0).any() and (table > 0).any() else start
  reach = np.abs(table - center).max() or abs(center) or 1.0
  last = max(steps[-1] for steps, _ in found.values())

  width, height = max(0.62 * columns, 2.4), max(4.6, 1.4 + 0.24 * len(found))
  fig = Figure(figsize=(width + 10, height), layout='constrained')
  left, right = fig.subplots(1, 2, width_ratios=(width + 2, 6.4))
  image = left.imshow(table, cmap='RdBu_r', vmin=center - reach, vmax=center + reach, aspect='auto')
  if columns <= 10:
    # Three significant digits of the largest, and as many decimal places for all.
    places = int(np.clip(2 - np.floor(np.log10(np.abs(table).max() or 1)), 0, 6))
    for (row, column), value in np.ndenumerate(table):
      color = 'white' if abs(value - center) > 0.6 * reach else INK
      left.text(column, row, f'{value:.{places}f}', ha='center', va='center', color=color, fontsize=9)
  colors = matplotlib.colormaps['viridis'](np.linspace(0, 0.95, len(found)))
  left.tick_params(length=0)
  left.tick_params(axis='y', length=8, width=5)  # ticks as a legend of the curves
  left.set_yticks(np.arange(len(found)), [_short(name) for name in found], fontsize=9)
  for tick, color in zip(left.yaxis.get_major_ticks(), colors, strict=True):
    tick.tick1line.set_markeredgecolor(color)
  left.set_xticks(np.arange(columns), np.arange(columns) + 1 if columns > 1 else ['all'])
  left.set(title='Learned step sizes', xlabel=f'inner step (after {last:,} meta-updates)')
  left.grid(False)
  left.spines[:].set_visible(False)
  bar = fig.colorbar(image, ax=left, pad=0.02, aspect=5 * height)
  bar.outline.set_visible(False)
  white = '0' if center == 0 else f"{center:.3g}, the first record's median"
  bar.set_label(f'step size (white: {white})')

  for (steps, values), color in zip(found.values(), colors, strict=True):
    right.plot(steps, values.mean(axis=1), color=color, linewidth=1.8, marker='o' if len(steps) == 1 else None)
  if center == 0:
    right.axhline(0, color=GREY, linestyle='--', linewidth=1.4)
  right.set(title='Mean over inner steps', ylabel='step size')
  _count_meta_updates(right)
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def loss_importance(path, records):
  """Draws how much the query loss after each inner step counts, one upon the other.

  Args:
    path: where the PNG goes.
    records: dicts with 'step' and 'train/loss_importance' (inner steps,). Without any nothing is drawn.
  """
  steps, values = _vectors(records, 'train/loss_importance')
  if not len(steps):
    return
  if len(steps) == 1:
    steps, values = np.array([0, steps[0]]), np.repeat(values, 2, axis=0)
  colors = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, values.shape[1]))
  fig = Figure(figsize=(7.4, 4.4), layout='constrained')
  ax = fig.subplots()
  labels = [f'step {k}' for k in range(1, values.shape[1] + 1)]
  bands = ax.stackplot(steps, values.T, colors=colors, linewidth=0)
  ax.legend(bands[::-1], labels[::-1], loc='center left', bbox_to_anchor=(1, 0.5), title='query loss after')
  ax.margins(0)
  ax.set(title='Importance of each inner step', ylabel='share of the task loss')
  _count_meta_updates(ax)
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def inner_steps(path, values, ci95, *, quantity, way=None):
  """Draws how adaptation helps: the mean over episodes after every inner step.

  Args:
    path: where the PNG goes.
    values: (inner steps + 1,) accuracy as fractions, or losses; the first one is before adaptation.
    ci95: (inner steps + 1,) half widths of the 95 % intervals.
    quantity: 'accuracy' or 'loss'.
    way: classes of an episode; draws the line of chance at 1 / way.
  """
  scale = 100 if quantity == 'accuracy' else 1
  values, ci95 = np.asarray(values) * scale, np.asarray(ci95) * scale
  steps = np.arange(len(values))
  fig = Figure(figsize=(6.4, 4.4), layout='constrained')
  ax = fig.subplots()
  if way:
    ax.axhline(scale / way, color=GREY, linestyle='--', linewidth=1.4)
    ax.annotate(
      f'chance, {scale / way:.3g} %', (1, scale / way), (0, 4), ax.get_yaxis_transform(), 'offset points',
      ha='right', va='bottom', color=GREY)  # fmt: skip
  if len(steps) <= 21:
    ax.errorbar(steps, values, ci95, color=BLUE, linewidth=2.2, marker='o', markersize=6, capsize=4, elinewidth=1.4)
  else:  # too many to tell apart
    ax.plot(steps, values, color=BLUE, linewidth=2.2)
    ax.fill_between(steps, values - ci95, values + ci95, color=BLUE, alpha=0.25, linewidth=0)
  for step in {0, len(values) - 1}:
    side = -1 if step == 0 and values[-1] > values[0] else 1  # where the curve does not go
    text = f'{values[step]:.1f} %' if scale == 100 else f'{values[step]:.3g}'
    ax.annotate(
      text, (step, values[step] + side * ci95[step]), (0, 6 * side), textcoords='offset points', ha='center',
      va='bottom' if side > 0 else 'top', color=BLUE, weight='bold')  # fmt: skip
  ax.margins(y=0.16)
  ax.set_ylim(bottom=max(ax.get_ylim()[0], -0.1 * max(values)))  # there is nothing below 0 but the label
  pad = max(0.5, 0.06 * steps[-1])
  ax.set_xlim(-pad, steps[-1] + pad)
  ax.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
  ax.set(
    title=f'Query {quantity} after each inner step',
    xlabel='inner steps (0: before adaptation)',
    ylabel=f'{quantity}{" (%)" if scale == 100 else ""}, mean ± 95 % interval',
  )
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def episode_grid(path, support, query, predictions, *, names):
  """Shows one episode, a row for each class: its support images, its queries, and what the wrong ones were taken for.

  Args:
    path: where the PNG goes.
    support: images (n, h, w, c) on any scale, targets (n,) in [0, way).
    query: the same for the queries.
    predictions: (queries,) predicted classes.
    names: (way,) of the classes.
  """
  way = len(names)
  images = _displayable(support[0], query[0])
  targets = [np.asarray(support[1]), np.asarray(query[1])]
  predictions = np.asarray(predictions)
  rows = [[np.flatnonzero(side == k)[:SHOWN] for side in targets] for k in range(way)]
  columns = [max(len(row[side]) for row in rows) for side in range(2)]
  inch = 0.82 if way <= 10 else 0.62
  small, large = 11.5 * inch, 15 * inch
  row_names, taken_for = _told_apart(names, (26, 12))
  taken_for = [f'✗ {name}' for name in taken_for]
  # Units are image sides: one axes for the whole figure is many times faster than one for each image.
  h, w = images[0].shape[1:3]
  ratio = np.clip(h / w, 1 / 3, 3)
  height, width = min(ratio, 1), min(1 / ratio, 1)
  pitch, row_pitch, gap = 1.1, height + 0.36, 0.55
  left = max(1.3, max(_inches(name, large) for name in row_names) / inch + 0.36)
  starts = [left, left + columns[0] * pitch + gap]
  shot, shown = len(targets[0]) // way, sum(len(row[1]) for row in rows)
  correct = np.mean(predictions == targets[1])
  title = f'{way}-way {shot}-shot episode: {100 * correct:.0f} % of {len(predictions)} queries correct'
  more = f', the first {SHOWN} of each class' if len(predictions) > shown else ''
  of_queries = f'queries and predictions{more}'
  right = max(
    starts[1] + columns[1] * pitch,
    starts[1] + _inches(of_queries, large) / inch,
    0.15 + _inches(title, 1.2 * large) / inch,
  )
  bottom = way * row_pitch
  smaller = small * min(1, pitch * inch / max(_inches(text, small) for text in taken_for))
  fig = Figure(figsize=(inch * (right + 0.2), inch * (bottom + 1.25)))
  ax = fig.add_axes((0, 0, 1, 1))
  ax.set_axis_off()

  for k, row in enumerate(rows):
    top = k * row_pitch
    ax.text(left - 0.18, top + height / 2, row_names[k], ha='right', va='center', fontsize=large, weight='bold')
    for side, members in enumerate(row):
      for column, index in enumerate(members):
        center = starts[side] + column * pitch + 0.5
        x = center - width / 2
        ax.imshow(images[side][index], cmap='gray', vmin=0, vmax=1, extent=(x, x + width, top + height, top))
        good = side == 0 or predictions[index] == k
        color = '#C4C4C4' if side == 0 else GREEN if good else RED
        line = 1 if side == 0 else 3.2 * inch
        ax.add_patch(Rectangle((x, top), width, height, fill=False, edgecolor=color, linewidth=line))
        if side == 1:
          text, size = ('✓', small) if good else (taken_for[predictions[index]], smaller)
          ax.text(center, top + height + 0.05, text, ha='center', va='top', color=color, fontsize=size, weight='bold')
  ax.plot([starts[1] - 0.08 - gap / 2] * 2, [-0.1, bottom - 0.2], color='#C4C4C4', linewidth=1.2)
  ax.text(0.15, -0.75, title, fontsize=1.2 * large, weight='bold', va='center')
  ax.text(starts[0], -0.2, 'support', fontsize=large, color=GREY)
  ax.text(starts[1], -0.2, of_queries, fontsize=large, color=GREY)
  ax.set(xlim=(0, right + 0.2), ylim=(bottom + 0.1, -1.15), aspect='equal')
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def regression_curves(path, tasks):
  """Draws regression tasks: truth, support points, predictions before and after adaptation; a panel each.

  Args:
    path: where the PNG goes.
    tasks: dicts of x_support (k,), y_support (k,), x (n,) sorted, y (n,) the truth, and predictions, a dict from the
      number of inner steps to (n,).
  """
  columns = int(np.ceil(np.sqrt(len(tasks))))
  rows = -(-len(tasks) // columns)
  fig = Figure(figsize=(5.2 * columns, 3.4 * rows + 1), layout='constrained')
  axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
  for ax in axes.flat[len(tasks) :]:
    ax.set_axis_off()
  for number, (ax, task) in enumerate(zip(axes.flat, tasks, strict=False), 1):
    ax.plot(task['x'], task['y'], color=INK, linewidth=4, alpha=0.25, label='truth')
    steps = sorted(task['predictions'])
    for step in steps:
      color, line = (GREY, ':') if step == 0 else (RED, '-') if step == steps[-1] else (ORANGE, '--')
      label = 'before adaptation' if step == 0 else f'after {step} step{"s"[: step > 1]}'
      ax.plot(task['x'], task['predictions'][step], line, color=color, linewidth=2, label=label)
    ax.plot(
      task['x_support'], task['y_support'], 'o', color=BLUE, markersize=7, markeredgecolor='white', label='support'
    )
    first, last = (np.mean(np.square(task['predictions'][step] - task['y'])) for step in (steps[0], steps[-1]))
    ax.set_title(f'Task {number}: mean squared error {first:.2g} → {last:.2g}', fontsize=11)
    ax.set_xlabel('x')
  for ax in axes[:, 0]:
    ax.set_ylabel('y')
  handles, labels = axes[0, 0].get_legend_handles_labels()
  fig.legend(handles, labels, loc='outside lower center', ncols=len(labels))
  fig.suptitle('Regression tasks before and after adaptation', x=0.01, ha='left')
  _save(fig, path)


@matplotlib.rc_context(STYLE)
def comparison(path, names, values, ci95, differences, differences_ci95, *, paired, quantity):
  """Draws runs one below the other: their means, and beside them the differences to the first run.

  Args:
    path: where the PNG goes.
    names: (runs,) str, the first on top.
    values: (runs,) accuracy as fractions, or losses.
    ci95: (runs,) half widths of the 95 % intervals.
    differences: (runs - 1,) of the others to the first run.
    differences_ci95: (runs - 1,) half widths.
    paired: (runs - 1,) bool: whether a difference is one on the same episodes; the others are drawn hollow. Those whose
      interval holds zero are grey.
    quantity: 'accuracy' or 'loss'.
  """
  scale, label = (100, 'accuracy (%)') if quantity == 'accuracy' else (1, 'mean squared error')
  values, ci95, differences, differences_ci95 = (
    np.multiply(x, scale) for x in (values, ci95, differences, differences_ci95)
  )
  fig = Figure(figsize=(11, 2.2 + 0.4 * len(names)), layout='constrained')
  left, right = fig.subplots(1, 2, sharey=True)
  bars = {'linestyle': 'none', 'markersize': 7, 'elinewidth': 1.8, 'capsize': 4}
  handles = {'mean, 95 % interval': left.errorbar(values, np.arange(len(names)), xerr=ci95, fmt='o', color=INK, **bars)}
  right.axvline(0, color=GREY, linestyle='--', linewidth=1.4)
  for row, (difference, half, pair) in enumerate(zip(differences, differences_ci95, paired, strict=True), 1):
    zero = abs(difference) <= half
    color, face = GREY if zero else BLUE, 'white' if not pair else GREY if zero else BLUE
    bar = right.errorbar(difference, row, xerr=half, fmt='o', color=color, markerfacecolor=face, **bars)
    kind = f'{"" if pair else "un"}paired difference, 95 % interval'
    handles.setdefault(f'{kind}{" with zero" if zero else ""}', bar)
  left.set_yticks(np.arange(len(names)), [_short(name, 40) for name in names])
  left.set_ylim(len(names) - 0.4, -0.6)
  left.set(title='Test episodes', xlabel=label)
  right.set(title=f'Difference to {_short(names[0])}', xlabel=label)
  for ax in (left, right):
    ax.tick_params(axis='y', length=0)
    ax.margins(x=0.08)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
  fig.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=min(len(handles), 3))
  _save(fig, path)


def _series(records, key, scale):
  """The values of a key by step: (n,) steps, (n,) values; where a step was recorded twice the later record counts."""
  found = {r['step']: r[key] for r in records if r.get(key) is not None and np.isfinite(r[key])}
  return np.array(sorted(found)), scale * np.array([found[step] for step in sorted(found)])


def _vectors(records, key):
  """A key's vectors by step: (n,) steps, (n, k) values; where a step was recorded twice the later record counts."""
  found = {r['step']: r[key] for r in records if key in r}
  return np.array(sorted(found)), np.array([found[step] for step in sorted(found)])


def _count_meta_updates(ax):
  """Makes the horizontal axis one of meta-updates: whole numbers, thousands as k."""
  ax.set_xlabel('meta-updates')
  ax.xaxis.set_major_formatter(EngFormatter(sep=''))
  ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _legend_below(ax):
  """Adds a legend, one row under the axes, where it hides no line."""
  ax.legend(
    loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=len(ax.get_legend_handles_labels()[0]),
    handlelength=1.3, columnspacing=1.2)  # fmt: skip


def _running_mean(values):
  """Smooths values (n,) by the mean over a centred window, shorter at the ends.

  Returns:
    (n,) means; the window's length: 5, or about n / 20 if that is more, but 1 where n is too small for a mean.
  """
  half = max(2, len(values) // 40 - 1) if len(values) >= 20 else 0
  ones = np.ones(2 * half + 1)
  sums, counts = (np.convolve(x, ones)[half : half + len(x)] for x in (values, np.ones(len(values))))
  return sums / counts, len(ones)


def _grey_or_rgb(images):
  """Channels that can be drawn: images (n, h, w, c) become (n, h, w), or the first three bands, (n, h, w, 3)."""
  return images[..., :3] if images.shape[-1] >= 3 else images.mean(axis=-1, dtype=np.float32)


def _scaled(*batches):
  """Scales batches together to [0, 1]."""
  low, high = min(np.min(b) for b in batches), max(np.max(b) for b in batches)
  return [np.clip((np.asarray(b, np.float32) - low) / max(high - low, 1e-12), 0, 1) for b in batches]


def _displayable(*batches):
  """Batches (n, h, w, c) as (n, h, w) or (n, h, w, 3) in [0, 1]; grey ink on black becomes black ink on white."""
  batches = _scaled(*(_grey_or_rgb(np.asarray(b)) for b in batches))
  on_black = batches[0].ndim == 3 and np.mean(batches[0] < 0.1) > 0.5
  return [1 - b if on_black else b for b in batches]


def _short(name, length=28):
  """A name as a label, cut at its beginning."""
  return _printable(name if len(name) <= length else f'...{name[3 - length :]}')


def _told_apart(names, lengths):
  """Names as labels of at most so many characters, a list for each length.

  They are cut where they still differ: at the end, at the beginning or in the middle; else they are numbered.
  """
  cuts = (
    lambda name, length: f'{name[: length - 1]}…',
    lambda name, length: f'…{name[1 - length :]}',
    lambda name, length: f'{name[: length // 2]}…{name[length // 2 + 1 - length :]}',
  )

  def cut_to(length):
    for cut in cuts:
      labels = [_printable(name if len(name) <= length else cut(name, length)) for name in names]
      if len(set(labels)) == len(labels):
        return labels

  labels = [cut_to(length) for length in lengths]
  return labels if all(labels) else _told_apart([f'{k}: {name}' for k, name in enumerate(names, 1)], lengths)


def _printable(name):
  """A label without what the font lacks or Matplotlib takes for a formula."""
  font = font_manager.get_font(font_manager.findfont(STYLE['font.family']))
  name = ''.join(c if c.isprintable() and font.get_char_index(ord(c)) else '?' for c in name)
  return name.replace('$', r'\$')


def _inches(text, size):
  """How wide a bold text of so many points is, with a margin, as letters on pixels are wider."""
  bold = font_manager.FontProperties(weight='bold')
  return 1.08 * TextPath((0, 0), text, size=size, prop=bold).get_extents().width / 72


def _save(fig, path, dpi=150):
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  image = io.BytesIO()
  fig.savefig(image, format='png', dpi=dpi, facecolor='white')
  write_atomically(path, image.getvalue())
