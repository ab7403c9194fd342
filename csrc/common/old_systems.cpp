// What lets a library that is built on a new system load on an older one, down to glibc 2.28 as
// torch itself: what the headers of newer systems take from newer libraries is defined here.
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// glibc 2.32. libstdc++ counts references without atomics where this says that there is one thread.
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}

// libstdc++ of GCC 11: the streams in which torch's checks write their messages, and a failure of
// std::allocator.
namespace std {
template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;
void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std

#endif
