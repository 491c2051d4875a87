# Sourced by the scripts that train on the CPU. XLA asks for the buffers of a step anew each time; the standard allocator gives them
# back to the kernel in between, and fetching the pages again took a fifth of the time of a small training step. jemalloc, where
# it is installed (Debian, Ubuntu: apt install libjemalloc2), keeps them; otherwise glibc is told to use huge pages.
if [ "${JAX_PLATFORMS:-cpu}" = cpu ] && [ -z "${LD_PRELOAD:-}${GLIBC_TUNABLES:-}" ]; then
  jemalloc="$(ldconfig -p 2>/dev/null | sed -n 's/.*libjemalloc\.so\.2.* => //p' | head -n 1)"
  if [ -n "$jemalloc" ]; then
    export LD_PRELOAD="$jemalloc" MALLOC_CONF="thp:always,dirty_decay_ms:60000,muzzy_decay_ms:60000"
  else
    export GLIBC_TUNABLES="glibc.malloc.hugetlb=1"
  fi
fi
