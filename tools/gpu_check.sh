#!/usr/bin/env bash
# All that needs a GPU, in at most 9 minutes: the tests marked cuda, then benchmarks/speed/gpu.py, whose rows go to $OUT or to benchmarks/results.
# tools/gpu_check.sh --wheels prints the packages that are needed beside torch and torchvision, and how to fetch them for a machine without a network;
# what lies in tools/wheels is installed first, into a temporary folder.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${GPU_CHECK_SECONDS:-530}
needs='fastai fastcore fastdownload fastprogress fasttransform plum-dispatch beartype cloudpickle python-fasthtml starlette python-multipart itsdangerous
 httpx2 httpcore2 h11 anyio truststore idna certifi charset-normalizer requests urllib3 albumentations albucore simsimd stringzilla opencv-python-headless
 pydantic pydantic-core annotated-types typing-inspection typing-extensions safetensors filelock packaging pillow numpy scipy scikit-learn joblib threadpoolctl
 pandas python-dateutil matplotlib contourpy cycler fonttools kiwisolver pyparsing pyyaml rich markdown-it-py mdurl pygments narwhals psutil tqdm pytest iniconfig pluggy'

listed() {  # 'all': the packages with the versions here; 'missing': those that are not here
    "$python" - "$1" $needs <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
which, names = sys.argv[1], sys.argv[2:]
for nm in names:
    try: found = f'{nm}=={version(nm)}'
    except PackageNotFoundError: found = None
    if which == 'missing' and found is None: print(nm)
    if which == 'all': print(found or nm)
PY
}

fetch() {  # how to fetch the packages $*
    echo "python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d tools/wheels $*"
}

if [ "${1:-}" = --wheels ]; then
    echo 'needed beside torch and torchvision (Python 3.12); leave out what is there already:'
    listed all | sed 's/^/  /'
    fetch $(listed all)
    exit 0
fi

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null || {
    echo "gpu_check: no CUDA for $python: run it on a machine with a GPU, torch and torchvision"; exit 2; }

if ls tools/wheels/*.whl > /dev/null 2>&1; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" tools/wheels/*.whl || exit 2
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1
missing=$(listed missing)
[ -z "$missing" ] || { echo "gpu_check: missing here: "$missing; fetch $missing; "$python" -c 'import fastai.learner, albumentations, pydantic, fastprogress, pytest' || exit 2; }

out=${OUT:-benchmarks/results}
mkdir -p "$out"
timeout 200 "$python" -m pytest -o addopts= -p no:cacheprovider -m cuda -rs -q $(grep -l 'mark\.cuda' tests/test_*.py) 2>&1 | tee "$out/gpu_tests.txt"
tests=${PIPESTATUS[0]}
graphs=()
"$python" -m pytest -o addopts= -p no:cacheprovider -q -k 'graphs_train' tests/test_cuda.py > /dev/null 2>&1 || graphs=(--no-graphs)
left=$((limit - SECONDS - 15))
timeout $((left + 10)) "$python" benchmarks/speed/gpu.py --seconds "$left" ${graphs[@]+"${graphs[@]}"}
times=$?
echo "gpu_check: $SECONDS s, tests $tests, times $times; results in $out"
[ "$tests" = 0 ] && [ "$times" = 0 ]
