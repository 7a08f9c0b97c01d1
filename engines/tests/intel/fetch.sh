#!/usr/bin/env bash
# Unpacks Intel's OpenCL driver for GPUs from Debian's development release into a folder, with the libraries that it
# needs. Nothing is installed, and apt's own settings stay as they are. About 300 MB.
# usage: fetch.sh FOLDER
#
# FOLDER/neo PLATFORM PROGRAM [ARGUMENT ...] then starts a program with that driver as if the machine had a GPU of the
# platform: dg2, pvc, mtl, arl, bmg, lnl or ptl. The driver compiles kernels for it, and executes none: a program that
# waits for one waits for ever.
set -euo pipefail
mkdir -p "${1:?usage: fetch.sh FOLDER}"/{apt/lists/partial,apt/cache/archives/partial,debs,root,icd}
cd "$1"
folder=$PWD

# The mirror that this machine uses.
sources=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{sources,list} 2>/dev/null | grep -v '^ *#' || true)
mirror=$(grep -oE '[a-z+]+://?[^ ]+/debian/?( |$)' <<<"$sources" | head -1 | tr -d ' ')
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [arch=amd64 signed-by=$keys] ${mirror:?no Debian mirror in apt\'s sources} sid main" >apt/sources.list
: >apt/status # as if nothing were installed
apt() {
  apt-get -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State="$folder/apt" -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status" \
    -o Dir::Cache="$folder/apt/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}
apt -qq update

# Level Zero's library makes the driver crash without a GPU. The others serve only an installed system.
left_out='^(libc-bin|libc-gconv.*|debconf|gcc-.*-base|intel-opencl-icd-legacy|libze.*)$'
wanted="intel-opencl-icd libigc2 libigdfcl2 libigdgmm12 libc6 libstdc++6 libgcc-s1 zlib1g libzstd1 ocl-icd-libopencl1"
# shellcheck disable=SC2086 # a list of words
names=$(apt -qq --no-install-recommends -s install $wanted | awk '$1 == "Inst" { print $2 }' | grep -vE "$left_out")
# shellcheck disable=SC2086
(cd debs && apt -qq download $names)
for package in debs/*.deb; do
  done="root/.$(basename "$package")"
  [ -e "$done" ] || { dpkg -x "$package" root && touch "$done"; }
done

libraries=$folder/root/usr/lib/x86_64-linux-gnu
echo "$libraries/intel-opencl/libigdrcl.so" >icd/neo.icd
# The driver's C library is newer than this machine's, so a program starts through its loader.
cat >neo <<END
#!/usr/bin/env bash
export NEO_CACHE_PERSISTENT=0 NEOReadDebugKeys=1 SetCommandStreamReceiver=5 UseAubStream=0 HardwareInfoOverride=5x4x8
export ProductFamilyOverride=\$1 OCL_ICD_VENDORS=$folder/icd/neo.icd
shift
exec $libraries/ld-linux-x86-64.so.2 --library-path $libraries:$libraries/intel-opencl:/usr/lib/x86_64-linux-gnu "\$@"
END
chmod +x neo
echo "$(ls debs | wc -l) packages are unpacked in $folder"
