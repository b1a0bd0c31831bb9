#!/usr/bin/env bash
# Makes sure that the compiler $1 finds GoogleTest; installs Debian's package if it does not.
set -euo pipefail
cxx=${1:-c++}

found() { echo '#include <gtest/gtest.h>' | "$cxx" -std=c++17 -E -x c++ - > /dev/null 2>&1; }

found && exit 0
echo "-- GoogleTest is missing: installing libgtest-dev"
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo -n)
if command -v apt-get > /dev/null; then
  "${sudo[@]}" apt-get update -qq && "${sudo[@]}" apt-get install -qq -y libgtest-dev > /dev/null || true
fi
found && exit 0
echo "error: GoogleTest is missing and could not be installed; install it (Debian, Ubuntu: apt-get install libgtest-dev," \
  "Fedora: dnf install gtest-devel) and try again" >&2
exit 1
