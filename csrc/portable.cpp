// Compiled into the files of a wheel only (TXL_PORTABLE in CMakeLists.txt): lets binaries that were
// built on a new Linux load on the oldest one that the tag manylinux_2_28 allows, with glibc 2.28
// and the libstdc++ of g++ 8. Nothing here is visible outside the file that it is linked into.
//
// glibc keeps the old versions of a function beside the new one, and the linker chooses the newest.
// The linker's option --wrap=f makes all calls of f call __wrap_f, which is defined here and calls
// the old version, named by .symver. Functions that the old libstdc++ lacks are defined here.
#include <exception>
#include <new>
#include <sstream>

#if defined(__x86_64__)
#define TXL_OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define TXL_OLDEST_GLIBC "GLIBC_2.17"
#else
#error "TXL_PORTABLE: the oldest version of glibc's symbols on this processor is not known"
#endif

#define TXL_OLD(name, symbol, version) __asm__(".symver old_" name "," symbol "@" version)

// ---- glibc

extern "C" {

// While a process has one thread, libstdc++ counts references without atomic instructions; it reads
// this variable of glibc 2.32. 0 means that there may be more threads, which is always correct.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// In each glibc both versions of exp and log compute the same values; they handle errors in
// different ways, which nothing here uses.
TXL_OLD("exp", "exp", TXL_OLDEST_GLIBC);
TXL_OLD("log", "log", TXL_OLDEST_GLIBC);
double old_exp(double x);
double old_log(double x);
double __wrap_exp(double x) {
  return old_exp(x);
}
double __wrap_log(double x) {
  return old_log(x);
}

// These have a new version since they moved from libdl to libc, with the same code.
TXL_OLD("dlopen", "dlopen", TXL_OLDEST_GLIBC);
TXL_OLD("dlsym", "dlsym", TXL_OLDEST_GLIBC);
TXL_OLD("dlclose", "dlclose", TXL_OLDEST_GLIBC);
TXL_OLD("dlerror", "dlerror", TXL_OLDEST_GLIBC);
void* old_dlopen(const char* path, int flags);
void* old_dlsym(void* handle, const char* name);
int old_dlclose(void* handle);
char* old_dlerror();
void* __wrap_dlopen(const char* path, int flags) {
  return old_dlopen(path, flags);
}
void* __wrap_dlsym(void* handle, const char* name) {
  return old_dlsym(handle, name);
}
int __wrap_dlclose(void* handle) {
  return old_dlclose(handle);
}
char* __wrap_dlerror() {
  return old_dlerror();
}

}  // extern "C"

// ---- libstdc++

namespace std {
[[noreturn]] void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std

// libstdc++ exports the default constructor since g++ 9, and C++20's form of str() since g++ 11.
template std::ostringstream::basic_ostringstream();
template std::string std::ostringstream::str() const&;
template std::string std::stringbuf::str() const&;

// Since g++ 11, copies and destructors of std::exception_ptr are inline functions, which call
// _M_addref and _M_release. libstdc++ exports these two since then, and the functions for a whole
// copy and for a destruction since g++ 4.4.
extern "C" {
TXL_OLD("copy_exception_ptr", "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_", "CXXABI_1.3.3");
TXL_OLD("destroy_exception_ptr", "_ZNSt15__exception_ptr13exception_ptrD1Ev", "CXXABI_1.3.3");
void old_copy_exception_ptr(void* self, const void* other);
void old_destroy_exception_ptr(void* self);
}

namespace std::__exception_ptr {

// A copy that is never destroyed adds one reference.
void exception_ptr::_M_addref() noexcept {
  alignas(exception_ptr) unsigned char copy[sizeof(exception_ptr)];
  old_copy_exception_ptr(copy, this);
}

void exception_ptr::_M_release() noexcept {
  old_destroy_exception_ptr(this);
  _M_exception_object = nullptr;
}

}  // namespace std::__exception_ptr
