"The report of a run: what is on the page against an independent computation, names that hold anything, and the page in a browser"
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import nn

from s9_fastai.app.evaluate import run_learner, s9_evaluate, s9_report
from s9_fastai.app.page import run_page, write_page
from s9_fastai.app.train import s9_train
from s9_fastai.data.loaders import image_dls
from s9_fastai.report.outputs import Outputs, outputs_of
from s9_fastai.report.page import page_html

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
hostile = ['<script>alert(1)</script>', 'a"b\'c', '\x1b[31mred', '\u202eabc', 'ｄｏｇ', '<img src=x onerror=alert(2)>', '&amp;', '{{ 7*7 }}', '$x_1$', 'x'*200]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run of an epoch on the sample"
    path = tmp_path_factory.mktemp('runs')/'a run'
    s9_train('sample', epochs=1, n_channels=8, recipe='fast', out=path)
    return path


class Reader(HTMLParser):
    "The tables of a page by caption, and its texts and elements"
    def __init__(self, html):
        super().__init__()
        self.tables, self.texts, self.tags, self.path = {}, [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'table': self.rows = []
        if tag == 'tr': self.rows.append([])
        if tag in ('td', 'th'): self.rows[-1].append('')
        if tag not in ('meta', 'img', 'link', 'br', 'use', 'path', 'rect'): self.path.append(tag)

    def handle_endtag(self, tag):
        if tag in self.path:
            while self.path.pop() != tag: pass
        if tag == 'table': self.tables[' | '.join(self.rows[0])] = self.rows[1:]

    def handle_data(self, data):
        if 'td' in self.path or 'th' in self.path: self.rows[-1][-1] += data
        elif data.strip() and not {'style', 'script'} & {*self.path}: self.texts.append(data.strip())


def test_the_tables_are_those_of_scikit_learn(run):
    learn, _ = run_learner(run)
    with learn.no_bar(): outputs = outputs_of(learn)
    page = Reader((run/'report.html').read_text())
    rows = next(v for k, v in page.tables.items() if k.startswith('class | support'))
    precision, recall, f1, support = precision_recall_fscore_support(outputs.targets, outputs.predicted, zero_division=np.nan)
    def shares(values): return ['–' if np.isnan(v) else f'{v:.1%}' for v in values]
    assert [r[0] for r in rows] == [*outputs.classes] and [int(r[1]) for r in rows] == [*support]
    assert [r[4] for r in rows] == shares(precision) and [r[5] for r in rows] == shares(recall)
    pairs = next(v for k, v in page.tables.items() if k.startswith('true | predicted'))
    m = confusion_matrix(outputs.targets, outputs.predicted)
    names = [*outputs.classes]
    assert all(int(n) == m[names.index(a), names.index(b)] for a, b, n, _ in pairs)
    np.fill_diagonal(m, 0)
    assert int(pairs[0][2]) == m.max()
    acc = (outputs.targets == outputs.predicted).mean()
    assert f'{acc:.2%}' in page.texts and f'({acc:.2%})' in (run/'log.txt').read_text()


def test_a_run_ends_with_its_report(tmp_path, capsys):
    run = tmp_path/'run'
    s9_train('sample', recipe='stated', epochs=1, n_channels=4, bs=256, out=run)
    history = pd.read_csv(run/'history.csv')
    s9_train(resume=str(run), epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert f'the report: {run}/report.html' in lines and any(o.startswith('best class: ') for o in lines)
    page = Reader((run/'report.html').read_text())
    epochs = next(v for k, v in page.tables.items() if k.startswith('epoch | '))
    assert len(epochs) == 2 and float(epochs[0][1]) == pytest.approx(history.train_loss[0], rel=1e-3)
    settings = dict(r for k, v in page.tables.items() if k.startswith('setting | ') for r in v)
    assert settings['epochs'] == '2' and settings['seed'] == '42' and 'torch' in settings


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    pages = [s9_report(str(run), out=str(tmp_path/f'{i}.html')).read_bytes() for i in range(2)]
    assert pages[0] == pages[1] and len(pages[0]) < 5e6


def test_evaluation_is_that_of_the_training(run, capsys):
    [found] = s9_evaluate(str(run))
    row = pd.read_csv(run/'history.csv').iloc[-1]
    assert found['accuracy']['value'] == pytest.approx(row.valid_accuracy, abs=1e-6) and found['loss'] == pytest.approx(row.valid_loss, rel=1e-3)
    capsys.readouterr()
    s9_evaluate(str(run), json=True)
    assert json.loads(capsys.readouterr().out)['n'] == 500
    s9_evaluate(str(run), csv=True)
    assert capsys.readouterr().out.splitlines()[0].startswith('run,class,support,')
    s9_evaluate(str(run), str(run), tta=True)
    assert 'p = 1' in capsys.readouterr().out


@pytest.mark.parametrize('args, message', [
    (dict(run='nowhere'), 'nowhere'),
    (dict(data='nowhere'), 'nowhere'),
    (dict(out='none/page.html'), 'none'),
])
def test_wrong_input_of_the_report(run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as e: s9_report(**{'run': str(run), **args})
    assert '\n' not in str(e.value)
    assert s9_report(str(run), out='page.html').is_file()  # the remedy


def test_images_of_other_classes_are_refused(run, tmp_path):
    for c in 'ab':
        for i in range(5):
            (tmp_path/'own'/c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path/'own'/c/f'{i}{c}.png')
    with pytest.raises(ValueError, match='the images have 2 classes, but the network 10'): s9_report(str(run), data=str(tmp_path/'own'))


# --- names from data

class Bare(nn.Module):
    "A network whose outputs depend on the mean of each image"
    def __init__(self, c):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, c)

    def forward(self, x): return self.lin(self.conv(x).relu().mean((2, 3)))


@pytest.fixture(scope='module')
def nasty(tmp_path_factory):
    "The page of a network whose classes have hostile names"
    tmp = tmp_path_factory.mktemp('nasty')
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp/f'{i}.png')
        rows.append(dict(file=f'{i}.png', label=hostile[i % len(hostile)]))
    pd.DataFrame(rows).to_csv(tmp/'labels.csv', index=False)
    learn = Learner(image_dls(tmp/'labels.csv', size=16, bs=8, cache_dir=tmp/'cache', device='cpu', policy='none'), Bare(len(hostile)), CrossEntropyLossFlat())
    history = pd.DataFrame(dict(epoch=[1, 2], train_loss=[2., 1], valid_loss=[2., 1], train_accuracy=[0, .5], valid_accuracy=[0, .5], lr=[.1, .1]))
    history.to_csv(tmp/'history.csv', index=False)
    write_page(learn, tmp, {'data': hostile[0], 'note': hostile[5]}, tmp/'report.html')
    return tmp/'report.html'


def test_hostile_names_are_text(nasty):
    text = nasty.read_text()
    page = Reader(text)
    assert not {'\x1b', '\u202e'} & {*text} and '7*7' in text and '49' not in re.findall(r'<td>(.*?)</td>', text)
    assert sum(tag == 'script' for tag, _ in page.tags) == 1 and not any('onerror' in a or 'onclick' in a for _, a in page.tags)
    rows = next(v for k, v in page.tables.items() if k.startswith('class | support'))
    assert '<script>alert(1)</script>' in [r[0] for r in rows] and '&amp;' in [r[0] for r in rows]


def test_it_asks_for_nothing(nasty):
    text = nasty.read_text()
    found = [v for _, a in Reader(text).tags for k, v in a.items() if k in ('src', 'href', 'xlink:href', 'action', 'data')]
    assert all(v.startswith(('#', 'data:image/png')) for v in found) and "default-src 'none'" in text
    assert not re.findall(r'url\((?!#)', text) and '@import' not in text


# --- in a browser

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    if not chromium: pytest.skip('needs chromium')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()


def opened(browser, path, width=1280, scheme='light', **kwargs):
    "The page at `path`; all that it prints and asks for"
    page, heard = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, **kwargs).new_page(), []
    page.on('console', lambda m: heard.append(m.text))
    page.on('pageerror', lambda e: heard.append(str(e)))
    page.on('request', lambda r: heard.append(r.url) if not r.url.startswith(('file:', 'data:')) else None)
    page.on('dialog', lambda d: heard.append(d.message))
    page.goto(Path(path).as_uri())
    return page, heard


@pytest.mark.parametrize('width', [390, 820, 1280])
@pytest.mark.parametrize('which', ['run', 'nasty'])
def test_the_page_opens_without_a_word(browser, run, nasty, width, which):
    page, heard = opened(browser, dict(run=run/'report.html', nasty=nasty)[which], width)
    assert heard == [] and page.evaluate('document.documentElement.scrollWidth') <= width  # nothing is wider than the window
    assert page.locator('section').count() == 8 and page.locator('h1').count() == 1
    for box in (o.bounding_box() for o in page.locator('figure svg, figure img').all()): assert box['width'] > 100 and box['height'] > 50


def luminance(rgb):
    v = [c/255 for c in rgb]
    return np.dot([c/12.92 if c <= 0.03928 else ((c + 0.055)/1.055)**2.4 for c in v], (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_texts_have_the_contrast_of_wcag_aa(browser, run, scheme):
    page, _ = opened(browser, run/'report.html', scheme=scheme)
    found = page.evaluate('''() => [...document.querySelectorAll('h1, h2, p, dt, dd, small, td, th, a, figcaption, caption, summary')].map(e => {
        let b = e; while (b && getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement
        return [getComputedStyle(e).color, getComputedStyle(b || document.body).backgroundColor, e.tagName] })''')
    assert len(found) > 100
    for ink, paper, tag in found:
        a, b = sorted(luminance([int(v) for v in re.findall(r'\d+', o)[:3]]) for o in (ink, paper))
        assert (b + 0.05)/(a + 0.05) >= 4.5, (tag, ink, paper)


def test_tables_are_sorted_by_keyboard(browser, run):
    page, heard = opened(browser, run/'report.html')
    table = page.locator('#classes table')
    def column(i): return [float(o.get_attribute('data-value') or 'nan') for o in table.locator(f'tbody td:nth-child({i})').all()]
    recall = column(6)
    table.locator('th:nth-child(6) button').focus()
    page.keyboard.press('Enter')
    assert column(6) == sorted(recall) and table.locator('th:nth-child(6)').get_attribute('aria-sort') == 'ascending'
    page.keyboard.press('Enter')
    assert column(6) == sorted(recall, reverse=True) and heard == []


def test_pictures_have_texts_and_links_have_places(browser, run):
    page, _ = opened(browser, run/'report.html')
    assert all(o.get_attribute('aria-label') for o in page.locator('svg').all()) and all(o.get_attribute('alt') for o in page.locator('img').all())
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len({*ids}) and all(o.get_attribute('href')[1:] in ids for o in page.locator('a').all())


def test_it_is_printed_on_white(browser, run):
    page, _ = opened(browser, run/'report.html', scheme='dark')
    page.emulate_media(media='print')
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == 'rgb(255, 255, 255)'
    assert not page.locator('nav').is_visible()


def test_forty_classes(tmp_path):
    rng = np.random.default_rng(0)
    for c in range(40):
        for i in range(5):
            (tmp_path/'own'/f'class {c:02}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path/'own'/f'class {c:02}'/f'{i}.png')
    learn = Learner(image_dls(tmp_path/'own', size=16, bs=8, cache_dir=tmp_path/'cache', device='cpu', policy='none'), Bare(40), CrossEntropyLossFlat())
    history = pd.DataFrame(dict(epoch=[1], train_loss=[2.], valid_loss=[2.], train_accuracy=[0.], valid_accuracy=[0.1], lr=[.1]))
    with learn.no_bar(): html = page_html(run_page(learn, history, {}, outputs_of(learn)))
    assert len(html) < 5e6 and len(next(v for k, v in Reader(html).tables.items() if k.startswith('class | support'))) == 40
