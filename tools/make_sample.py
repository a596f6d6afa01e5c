"""Make the embedded sample from an archive (or folder) of CIFAR-10 in fastai's layout.

    python tools/make_sample.py cifar10.tgz          write s9_fastai/assets/cifar10_sample.tar.bz2
    python tools/make_sample.py cifar10.tgz --check  fail unless that file is what the rule gives, byte for byte

The rule: of each class the first 200 training and the first 50 test images, in the order of the numbers in their names.
The PNG files go in as they are. Names are sorted, times and owners fixed, and bzip2 has one implementation, so every
machine writes the same bytes (gzip's depend on the version of zlib).
"""
import argparse
import sys
import tarfile
from io import BytesIO
from pathlib import Path

from s9_fastai.cifar.archives import archive_files
from s9_fastai.cifar.load import SAMPLE
from s9_fastai.cifar.facts import CLASSES, SPLITS
from s9_fastai.cifar.layouts import file_bytes, folder_files, image_order

SIZES = {'train': 200, 'test': 50}  # images of each class
MTIME = 1230768000                  # 2009-01-01, the year of the report that describes CIFAR-10


def chosen(
    files: dict,  # place in the layout -> path or content, as from `archive_files`
) -> list:  # places of the chosen images, in the order of the sample
    "The places in `files` that the rule chooses; `ValueError` if a class has too few images"
    places = []
    for s in SPLITS:
        for c in CLASSES:
            ps = sorted((p for p in files if len(p) == 3 and p[:2] == (s, c)), key=lambda p: image_order(p[2]))
            if len(ps) < SIZES[s]: raise ValueError(f'{s}/{c}: {len(ps)} images, at least {SIZES[s]} are needed')
            places += ps[:SIZES[s]]
    return places


def sample_bytes(
    src: Path,  # archive or folder of CIFAR-10 in fastai's layout
) -> bytes:  # the sample, a tar archive compressed with bzip2
    "The sample that the rule gives for `src`; `ValueError` as `chosen`"
    files, f = folder_files(src) if src.is_dir() else archive_files(src), BytesIO()
    with tarfile.open(fileobj=f, mode='w:bz2', format=tarfile.USTAR_FORMAT, compresslevel=9) as tf:
        for p in chosen(files):
            data, m = file_bytes(p, files[p]), tarfile.TarInfo('/'.join(('cifar10', *p)))
            m.size, m.mtime, m.mode = len(data), MTIME, 0o644
            tf.addfile(m, BytesIO(data))
    return f.getvalue()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument('src', type=Path, help="archive or folder of CIFAR-10 in fastai's layout")
    p.add_argument('--out', type=Path, default=SAMPLE, help='file to write (default: the one in the package)')
    p.add_argument('--check', action='store_true', help='write nothing, compare')
    a = p.parse_args()
    try: data = sample_bytes(a.src)
    except (OSError, ValueError) as e: p.error(str(e))
    if a.check: sys.exit(None if a.out.read_bytes() == data else f'{a.out} is not what the rule gives: write it again')
    a.out.write_bytes(data)
    print(f'{a.out}: {len(data)} bytes')


if __name__ == '__main__': main()
