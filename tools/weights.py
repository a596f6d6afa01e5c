"""The weights that come with the package, and their model card, from a run of `benchmarks/accuracy/accuracy.py`.

    python tools/weights.py NAME SEED    take the weights of that run; measure them with benchmarks/accuracy/robustness.py
                                         (then run 31_nets.tta, 79_app.predict, 80_tour and 83_evidence, which show what they see)
    python tools/weights.py --card       write the card anew from benchmarks/results
    python tools/weights.py --check      exit with 1 if the card is not what the results say of these weights
"""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from s9_fastai.cifar.facts import MEAN, STD
from s9_fastai.app.recipe import Recipe
from s9_fastai.nets.net import Net
from s9_fastai.app.run import open_run
from s9_fastai.core.weights import read_tensors
from s9_fastai.nets.saved import save_net

root = Path(__file__).resolve().parent.parent
data, results = root/'s9_fastai'/'assets', root/'benchmarks'/'results'


def newest(script, what, **fields):
    "The last line of `script` that is called `what` and has `fields`"
    found = [json.loads(o) for o in (results/f'{script}.jsonl').read_text(encoding='utf-8').splitlines()]
    return [o for o in found if o['what'] == what and all(o[k] == v for k, v in fields.items())][-1]


def take(name, seed):
    "Put the weights of a run into the package, with what they are in the header"
    run = root/'runs'/'accuracy'/name/'runs'/f'seed={seed}'
    found, acc = open_run(run), newest('accuracy', name)
    recipe = asdict(found.recipe)
    if (acc['recipe'], int(seed) in acc['seeds']) != (recipe, True): sys.exit(f'{run} is not among the results of {name}')
    net, spec = found.net()
    save_net(net, data/'net.safetensors', found.recipe.architecture(len(spec.classes)), spec, result=name, seed=str(seed),
             recipe=json.dumps(recipe))
    subprocess.run([sys.executable, root/'benchmarks'/'accuracy'/'robustness.py'], check=True)


def table(head, rows):
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in (head, ['---']*len(head), *rows))


TEXT = """# Model card of `net.safetensors`

A `Net` of {parameters:,} parameters, float32, for `Net.pretrained()`, `s9_learner(dls, pretrained=True)` and `s9_predict`.

**Accuracy: {correct} of the {n_test:,} test images of CIFAR-10 ({part:.2%}), counted in float32.** `s9_predict` looks at each mirror image too (`FlipTTA`), and recognises {mirrored}. The recipe reaches {mean:.2f}% (mean over seeds {seeds}; n = {n}{spread}; {autocast_dtype}).
These are the weights of seed {seed}, which was not chosen by its accuracy.

- **Data.** The 50,000 training images of CIFAR-10 (Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009), all of them; no other images. {teacher}The recipe was chosen on 5,000 of them that were held out.
- **Input.** RGB images as floats (B, 3, 32, 32): pixels from 0 to 1, less the mean {mean_rgb}, divided by {std_rgb}.
- **Output.** Logits (B, 10), in the order of the table by class.
- **Recipe.** {result}: {epochs} epochs; where it differs from the experiment's recipe: {changed}. `{command}` at commit `{commit}` trains it again.
- **Hardware.** {cpu}, {cores} cores; torch {torch}, fastai {fastai}.

Both tables are of one look at each image.

## By class

{classes}

## With corruptions

Made on the fly by `benchmarks/accuracy/robustness.py`. They are like those of CIFAR-10-C (Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*, 2019), and no replica of its files, so compare with care. `s9_fastai.augment.corruptions` has what the strengths are.

{harder}

## Limits

- Ten classes, and no word for anything else: it names one of them for every image, with a probability that says little about images of another kind.
- Trained on 32x32 pixels. A photograph is cut to its middle square and made that small first; what is not in the middle is not seen.
- Noise, blur, fog, low contrast, coarse pixels and JPEG compression cost accuracy, as the table shows. It was not trained against them.
- CIFAR-10's images were collected from the web, by search words, before 2009. What is rare there is rare here.
- For teaching and experiments. Not for decisions about people or safety. MIT licence, as the package.
"""


def teacher(recipe):
    "A sentence on the network that taught, if one did"
    if not recipe.get('distill'): return ''  # the oldest have no such field
    o = newest('teacher', 'teacher')
    return (f"Beside their labels it learnt from the predictions of a larger network of {o['parameters']:,} parameters, which was trained on "
            f"{50_000 - o['recipe']['held_out']:,} of them (`benchmarks/accuracy/teacher.py`); the predictions come with the package. ")


def tables(rob):
    "The two tables of the card, from a line of `robustness.py`"
    n, per_class = rob['n_test'], rob['n_test']//len(rob['by_class'])
    strengths = {nm: ', '.join(map(str, s)) for nm, s in rob['strengths'].items()}
    return dict(
        classes=table(['class', 'recognised'], [(c, f'{k/per_class:.1%}') for c, k in rob['by_class'].items()]),
        harder=table(['corruption', 'strengths', *(f'severity {i}' for i in range(1, 6))],
                     [(nm, strengths[nm], *(f'{k/n:.1%}' for k in ks)) for nm, ks in rob['corruptions'].items()]))


def card():
    "The model card, as Markdown"
    _, about = read_tensors(data/'net.safetensors')
    acc = newest('accuracy', about['result'], recipe=json.loads(about['recipe']))  # a recipe may change and keep its name
    rob = newest('robustness', 'net.safetensors')
    changed = ', '.join(f'{k} {v}' for k, v in acc['recipe'].items() if k != 'epochs' and getattr(Recipe(), k) != v)
    facts = {**acc, **acc['hardware'], **acc['versions'], 'result': about['result'], 'seed': about['seed'], **tables(rob)}
    return TEXT.format(**{
        **facts, 'parameters': sum(p.numel() for p in Net().parameters()), 'correct': rob['correct'], 'mirrored': rob['mirrored'], 'changed': changed, 'mean_rgb': MEAN, 'std_rgb': STD,
        'teacher': teacher(acc['recipe']), 'n_test': rob['n_test'], 'part': rob['correct']/rob['n_test'], 'seeds': ', '.join(map(str, acc['seeds'])),
        'spread': f', standard deviation {acc["std"]:.2f}' if acc['std'] else ''})


def main():
    path = data/'model_card.md'
    if len(sys.argv) == 3: take(sys.argv[1], sys.argv[2])
    elif sys.argv[1:] not in (['--card'], ['--check']): sys.exit(__doc__)
    if '--check' in sys.argv:
        stale = path.read_text(encoding='utf-8') != card()
        sys.exit('the model card is stale: run python tools/weights.py --card' if stale else 0)
    path.write_text(card(), encoding='utf-8')


if __name__ == '__main__': main()
