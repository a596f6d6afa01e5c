"Draws what `loaders.py` and `epochs.py` measured: cost against batch size, workers and number of training images"
import json
import sys
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import options, read_lines
from s9_fastai.report.plots import Picture, save_picture

# colours that the colour-blind can distinguish, and markers for print in grey
LOOKS = {'fastai': ('fastai idiom', '#D55E00', 'o'), 'pytorch': ('plain PyTorch', '#0072B2', 's'),
         'torchvision': ('torchvision v2', '#CC79A7', 'D'), 'kornia': ('kornia', '#E69F00', 'v'),
         'item': ('item path', '#009E73', '^'), 'batch': ('batch path', '#4D4D4D', 'P')}
STYLES = {'': 'solid', '2': 'dashed', 'fast': 'solid', 'plain': 'dotted'}  # by the second part of a method's name


def newest(file, measure):
    "The lines of `measure` in `file`, the newest for each setting"
    lines = [o for o in read_lines(file) if o['measure'] == measure]
    return list({json.dumps(o['settings']): o for o in lines}.values())


def pick(lines, **settings):
    "The lines with these `settings`"
    return [o for o in lines if all(o['settings'][k] == v for k, v in settings.items())]


def draw(ax, lines, x, cost):
    "A curve for each method: `cost` of its median, with bars from least to most, against the setting `x`"
    for name in dict.fromkeys(o['settings']['method'] for o in lines):
        who, _, style = name.partition('-')
        rows = sorted(pick(lines, method=name), key=lambda o: o['settings'][x])
        mid, *ends = ([cost(o[k]) for o in rows] for k in ('median', 'min', 'max'))
        bars = [[abs(m - f(e)) for m, *e in zip(mid, *ends)] for f in (min, max)]
        ax.errorbar([o['settings'][x] for o in rows], mid, bars, color=LOOKS[who][1], marker=LOOKS[who][2],
                    ls=STYLES[style], lw=1.4, ms=5, elinewidth=0.8)


def tidy(ax, lines, title, x, label):
    "What the panels have in common: as many ticks as there were settings, a log scale for the cost"
    ax.set_title(f'{title}, log scale', loc='left', fontsize=10)
    ax.set(xlabel=label, yscale='log')
    if x != 'workers': ax.set_xscale('log')
    ax.set_xticks(sorted({o['settings'][x] for o in lines}))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:,g}'))
        axis.set_minor_locator(NullLocator())
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    if not lines: ax.text(0.5, 0.5, 'not measured yet', ha='center', transform=ax.transAxes)


def legend(fig, lines):
    "Colours for methods, line styles for how they run, above the panels"
    seen = {o['settings']['method'].partition('-')[0] for o in lines}
    who = [Line2D([], [], color=c, marker=m, label=nm) for k, (nm, c, m) in LOOKS.items() if k in seen]
    ways = {o['settings']['method'].partition('-')[2] for o in lines}
    how = [Line2D([], [], color='k', ls=STYLES[k], label=nm) for k, nm in
           (('2', 'right panel, dashed: 2 workers'), ('plain', 'right: plain compute')) if k in ways]
    fig.legend(handles=who + how, loc='outside upper center', ncols=4, frameon=False, fontsize=9)


def panels(loading, epochs):
    "(lines, title, setting, its label, cost) of the three panels"
    full = max((o['settings']['images'] for o in loading), default=0)
    loading, per_1000 = pick(loading, images=full), lambda rate: 1e6/rate
    title = 'loading, ms for 1,000 images'
    return [(pick(loading, workers=0), title, 'bs', 'images a batch (no workers)', per_1000),
            (pick(loading, bs=128), title, 'workers', 'workers (batches of 128)', per_1000),
            (epochs, 'epoch with its test, s', 'images', 'training images', float)]


def main():
    out = options(__doc__).parse_args().out  # where the results are, and the picture too
    loading = newest(out/'loaders.jsonl', 'loading')
    epochs = [o for o in newest(out/'epochs.jsonl', 'epoch') if not o['what'].startswith('recipe')]
    fig = Picture(figsize=(10, 4), dpi=100, layout='constrained')
    for ax, (lines, title, x, label, cost) in zip(fig.subplots(1, 3), panels(loading, epochs)):
        draw(ax, lines, x, cost)
        tidy(ax, lines, title, x, label)
    legend(fig, loading + epochs)
    save_picture(fig, out/'speed.png')


if __name__ == '__main__': main()
