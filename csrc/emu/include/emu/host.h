// For hosts of the emulation: kernels by name with their arguments as words, so that Python can launch them (host.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace emu {

using Entry = void (*)(const uint64_t* words);
struct Registration {
  Registration(const char* name, Entry entry, int num_words);
};

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <auto kernel, typename... Args, size_t... I>
void call_with(const uint64_t* words, void (*)(Args...), std::index_sequence<I...>) {
  kernel(from_word<Args>(words[I])...);
}
template <auto kernel, typename... Args>
constexpr int num_words(void (*)(Args...)) {
  return sizeof...(Args);
}
template <auto kernel, typename... Args>
constexpr std::index_sequence_for<Args...> word_indices(void (*)(Args...)) {
  return {};
}

}  // namespace emu

#define EMU_KERNEL(kernel)                                                                                     \
  static const emu::Registration kernel##_registration(                                                        \
      #kernel,                                                                                                 \
      [](const uint64_t* words) { emu::call_with<kernel>(words, kernel, emu::word_indices<kernel>(kernel)); }, \
      emu::num_words<kernel>(kernel));
