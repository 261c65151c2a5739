// Two references to newer versions of glibc than 2.28, replaced, so that a library built anywhere runs where
// manylinux_2_28 does. Linked with --wrap=log.

extern "C" {

// Of libstdc++, since glibc 2.32: whether the process has one thread, so that shared pointers can do without atomics.
// It may always have more.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

#if defined(__x86_64__)
__asm__(".symver act_log, log@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver act_log, log@GLIBC_2.17");
#endif
double act_log(double x);  // glibc's first; that of 2.29 differs in how it tells errors

__attribute__((visibility("hidden"))) double __wrap_log(double x) { return act_log(x); }
}
