#!/usr/bin/env bash
# Puts Fashion-MNIST (MIT licence, 30 MB) into data/fashion-mnist, from Debian's package dataset-fashion-mnist.
# Needs no root: the package is downloaded and unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
into=data/fashion-mnist
last=t10k-labels-idx1-ubyte.gz

if [ -n "${RESVIT_FASHION_MNIST:-}" ] || [ -f "$into/$last" ] || [ -f "/usr/share/datasets/fashion-mnist/$last" ]; then
    exit 0
fi
if ! command -v apt-get > /dev/null; then
    echo "error: Fashion-MNIST is not here, and there is no apt-get to fetch it with." >&2
    echo "  → Put the four idx .gz files into $into, or name their folder in RESVIT_FASHION_MNIST." >&2
    exit 1
fi
echo "Fetching Fashion-MNIST (30 MB), from Debian's package dataset-fashion-mnist."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! (cd "$work" && apt-get download dataset-fashion-mnist 2> /dev/null); then
    # No package lists yet: fetch them into a folder of our own, which works without root too.
    mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial"
    options=(-o "Dir::State::lists=$work/state/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
    echo "Fetching Debian's list of packages first."
    apt-get -q "${options[@]}" update
    (cd "$work" && apt-get -q "${options[@]}" download dataset-fashion-mnist)
fi
dpkg -x "$work"/dataset-fashion-mnist_*.deb "$work/unpacked"
mkdir -p data
cp -r "$work/unpacked/usr/share/datasets/fashion-mnist" "$work/ready"
rm -rf "$into"
mv "$work/ready" "$into"
echo "Fashion-MNIST is in $into"
