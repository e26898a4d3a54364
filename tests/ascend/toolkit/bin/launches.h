// What the stand-in compiler makes of kernel<<<blocks, shared, stream>>>(arguments): a launch on the emulation.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emu/host.h"

extern "C" int emu_launch(const char*, int, int, uint64_t, const uint64_t*, int, char*, uint64_t);

namespace stand_in {

template <typename T>
uint64_t word(T value) {
  uint64_t w = 0;
  std::memcpy(&w, &value, sizeof(T));
  return w;
}

// Arguments become parameters as in a call: a type that does not convert does not compile.
template <auto kernel, typename... Parameters>
void started(const char* name, int kind, uint32_t blocks, void (*)(Parameters...), Parameters... arguments) {
  static const emu::Registration known(
      name, [](const uint64_t* words) { emu::call_with<kernel>(words, kernel, emu::word_indices<kernel>(kernel)); },
      emu::num_words<kernel>(kernel));
  const uint64_t words[] = {word(arguments)...};
  char text[2000];
  if (emu_launch(name, kind, static_cast<int>(blocks), 7, words, sizeof...(arguments), text, sizeof(text)) == 0) return;
  std::fprintf(stderr, "%s\n", text);
  std::abort();
}

}  // namespace stand_in
