// The cube core: into fractals, L1 to L0, products, and out. A fractal is 16 rows of 32 bytes.
#include <cstring>

#include "convert.h"
#include "machine.h"

namespace emu {
namespace {

constexpr int64_t kFractal = 512;

int64_t sixteens(int64_t n) { return (n + 15) / 16; }

float read_half(Dtype type, const uint8_t* at) {
  return type == Dtype::kHalf ? half_value(load<uint16_t>(at)) : bfloat16_value(load<uint16_t>(at));
}

}  // namespace

void copy_in_fractal(Call call, const Local& dst, const Global& src, const Nd2Nz& shape, int size) {
  if (src.address == nullptr)
    fail(*current, call, PIPE_MTE2, "position", "fractals are made on the way from global memory only");
  if (check_local(call, PIPE_MTE2, dst, 32) != Memory::kL1)
    fail(*current, call, PIPE_MTE2, "position", "fractals are made in L1");
  const int64_t in_block = 32 / size;
  Operation operation;
  operation.call = call;
  operation.marks_itself = true;
  struct Piece {
    uint64_t from, to, bytes;
  };
  std::vector<Piece> pieces;
  for (int64_t matrix = 0; matrix < shape.matrices; ++matrix) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      const uint64_t from = uint64_t(matrix * shape.source_matrix_stride + row * shape.source_row_stride) * size;
      operation.reads.push_back(global_access(call, PIPE_MTE2, src, from, uint64_t(shape.columns) * size));
      for (int64_t column = 0; column < (machine.recording ? 0 : shape.columns); column += in_block) {
        const uint64_t to = uint64_t(matrix * shape.matrix_stride) * size +
                            uint64_t(column / in_block * shape.column_block_stride + row * shape.row_stride) * 32;
        operation.writes.push_back(local_access(call, PIPE_MTE2, dst, to, 32));
        pieces.push_back({from + column * size, to, uint64_t(std::min(in_block, shape.columns - column)) * size});
      }
    }
  }
  if (operation.reads.empty()) return;
  operation.run = [=, pieces = std::move(pieces)] {
    for (const Piece& piece : pieces) {
      uint8_t* to = bytes_of(*current, Memory::kL1, dst.address + piece.to);
      std::memset(to, 0, 32);
      std::memcpy(to, src.address + piece.from, piece.bytes);
      mark_known(*current, dst, piece.to, 32, true);
    }
  };
  issue(PIPE_MTE2, std::move(operation));
}

// Rows of a fractal that were never filled go along, and stay unknown.
void load_fractals(Call call, const Local& dst, const Local& src, const FractalLoad& load_, int size) {
  const Memory to = memory_of(dst.position);
  if (to != Memory::kL0A && to != Memory::kL0B)
    fail(*current, call, PIPE_MTE1, "position", "LoadData fills L0A or L0B");
  check_local(call, PIPE_MTE1, dst, 512);
  if (check_local(call, PIPE_MTE1, src, 32) != Memory::kL1)
    fail(*current, call, PIPE_MTE1, "position", "LoadData reads L1");
  if (load_.repeat == 0) return;
  Operation operation;
  operation.call = call;
  operation.marks_itself = true;
  std::vector<std::pair<int64_t, int64_t>> moves;
  for (int64_t i = 0; i < load_.repeat; ++i) {
    const int64_t from = (load_.start + (load_.backwards ? -i : i) * load_.source_stride) * kFractal;
    const int64_t at = i * (1 + load_.target_gap) * kFractal;
    if (from < 0) fault_argument(call, "startIndex", load_.start, 0, 65535);
    operation.reads.push_back(local_access(call, PIPE_MTE1, src, uint64_t(from), kFractal, false));
    operation.writes.push_back(local_access(call, PIPE_MTE1, dst, uint64_t(at), kFractal));
    moves.push_back({from, at});
  }
  operation.run = [=, transpose = load_.transpose] {
    Store& from = current->stores[int(Memory::kL1)];
    Store& into = current->stores[int(to)];
    for (const auto& [source, target] : moves) {
      for (int64_t i = 0; i < kFractal / size; ++i) {
        const int64_t j = transpose ? i % 16 * 16 + i / 16 : i;
        for (int byte = 0; byte < size; ++byte) {
          into.bytes[dst.address + target + j * size + byte] = from.bytes[src.address + source + i * size + byte];
          into.known[dst.address + target + j * size + byte] = from.known[src.address + source + i * size + byte];
        }
      }
    }
  };
  issue(PIPE_MTE1, std::move(operation));
}

// A in rows of fractals of rows, B in rows of fractals of columns, C in columns of fractals of rows.
void multiply(Call call, const Local& dst, const Local& a, const Local& b, Dtype type, int64_t m, int64_t n, int64_t k,
              bool from_zero) {
  if (check_local(call, PIPE_M, dst, 1024) != Memory::kL0C) fail(*current, call, PIPE_M, "position", "Mmad writes L0C");
  if (check_local(call, PIPE_M, a, 512) != Memory::kL0A)
    fail(*current, call, PIPE_M, "position", "Mmad reads its first factor in L0A");
  if (check_local(call, PIPE_M, b, 512) != Memory::kL0B)
    fail(*current, call, PIPE_M, "position", "Mmad reads its second factor in L0B");
  if (m == 0 || n == 0 || k == 0) return;
  if (m == 1) fail(*current, call, PIPE_M, "argument", "m = 1 reads its factor in another layout; pad to 16 rows");
  const int64_t rows = sixteens(m), columns = sixteens(n), depth = sixteens(k);
  Operation operation;
  operation.call = call;
  operation.marks_itself = true;
  operation.cycles = double(rows * columns * depth);           // 16 x 16 x 16 products each
  operation.settles = !from_zero && (m / 16) * (n / 16) < 10;  // a short one may overtake what it adds to
  operation.reads.push_back(local_access(call, PIPE_M, a, 0, uint64_t(rows * depth * kFractal), false));
  operation.reads.push_back(local_access(call, PIPE_M, b, 0, uint64_t(columns * depth * kFractal), false));
  operation.writes.push_back(local_access(call, PIPE_M, dst, 0, uint64_t(rows * columns * 1024)));
  if (!from_zero) operation.reads.push_back(local_access(call, PIPE_M, dst, 0, uint64_t(rows * columns * 1024), false));
  operation.run = [=] {
    const auto at_a = [=](int64_t i, int64_t p) {
      return (i / 16 * depth + p / 16) * kFractal + (i % 16 * 16 + p % 16) * 2;
    };
    const auto at_b = [=](int64_t p, int64_t j) {
      return (p / 16 * columns + j / 16) * kFractal + (j % 16 * 16 + p % 16) * 2;
    };
    const auto at_c = [=](int64_t i, int64_t j) {
      return (j / 16 * rows + i / 16) * 1024 + (i % 16 * 16 + j % 16) * 4;
    };
    Store& sa = current->stores[int(Memory::kL0A)];
    Store& sb = current->stores[int(Memory::kL0B)];
    Store& sc = current->stores[int(Memory::kL0C)];
    const auto known = [&](Memory memory, const Store& store, int64_t at, int bytes) {
      if (store.known[at] && store.known[at + bytes - 1]) return;
      fail(*current, call, PIPE_M, "uninitialised",
           "read " + stretch_text(memory, at, at + bytes) + ", which was never written");
    };
    if (from_zero) {
      poison(sc.bytes.data() + dst.address, rows * columns * 1024);
      mark_known(*current, dst, 0, rows * columns * 1024, false);
    }
    std::vector<float> left(m * k), right(k * n), sums(n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t p = 0; p < k; ++p) {
        const int64_t at = a.address + at_a(i, p);
        known(Memory::kL0A, sa, at, 2);
        left[i * k + p] = read_half(type, sa.bytes.data() + at);
      }
    }
    for (int64_t p = 0; p < k; ++p) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = b.address + at_b(p, j);
        known(Memory::kL0B, sb, at, 2);
        right[p * n + j] = read_half(type, sb.bytes.data() + at);
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = dst.address + at_c(i, j);
        if (!from_zero) known(Memory::kL0C, sc, at, 4);
        sums[j] = from_zero ? 0 : load<float>(sc.bytes.data() + at);
      }
      for (int64_t p = 0; p < k; ++p) {
        const float factor = left[i * k + p];
        const float* const row = right.data() + p * n;
        for (int64_t j = 0; j < n; ++j) sums[j] += factor * row[j];
      }
      for (int64_t j = 0; j < n; ++j) {
        store(sc.bytes.data() + dst.address + at_c(i, j), sums[j]);
        mark_known(*current, dst, at_c(i, j), 4, true);
      }
    }
  };
  issue(PIPE_M, std::move(operation));
}

// Values that were never computed go out too, and stay unknown: columns leave in sixteens.
void fix_out(Call call, const Global& dst, const Local& src, const FixOut& shape, Dtype type) {
  Core& core = *current;
  if (check_local(call, PIPE_FIX, src, 64) != Memory::kL0C) fail(core, call, PIPE_FIX, "position", "Fixpipe reads L0C");
  if (core.atomic && core.atomic_type != type)
    fail(core, call, PIPE_FIX, "argument", "the atomic addition was set for another type");
  const int size = size_of(type);
  Operation operation;
  operation.call = call;
  struct Line {
    uint64_t from, to;
    int64_t count;
  };
  std::vector<Line> lines;
  for (int64_t matrix = 0; matrix < shape.matrices; ++matrix) {
    for (int64_t row = 0; row < shape.m; ++row) {
      const uint64_t to = uint64_t(matrix * shape.target_matrix_stride + row * shape.row_stride) * size;
      Access write = global_access(call, PIPE_FIX, dst, to, uint64_t(shape.n) * size);
      write.atomic = core.atomic;
      operation.writes.push_back(write);
      if (machine.recording) {  // only how much there is
        operation.reads.push_back({Memory::kL0C, 0, uint64_t(shape.n) * 4});
        continue;
      }
      for (int64_t column = 0; column < shape.n; column += 16) {
        const int64_t count = std::min<int64_t>(16, shape.n - column);
        const uint64_t from =
            uint64_t(matrix * shape.source_matrix_stride * 256 + column / 16 * shape.source_stride * 16 + row * 16) * 4;
        operation.reads.push_back(local_access(call, PIPE_FIX, src, from, uint64_t(count) * 4, false));
        lines.push_back({from, to + column * size, count});
      }
    }
  }
  if (operation.writes.empty()) return;
  operation.run = [=, lines = std::move(lines), atomic = core.atomic] {
    const std::vector<uint8_t>& known = current->stores[int(Memory::kL0C)].known;
    for (const Line& line : lines) {
      int64_t unknown = line.count;  // the first one; what follows it in a fractal is not known either
      for (int64_t i = line.count; i-- > 0;) {
        if (!known[src.address + line.from + i * 4]) unknown = i;
      }
      if (unknown < line.count) {
        if (atomic) fail(*current, call, PIPE_FIX, "uninitialised", "adds values of L0C that were never written");
        mark_global_unknown(reinterpret_cast<uint64_t>(dst.address) + line.to + unknown * size,
                            reinterpret_cast<uint64_t>(dst.address) + line.to + line.count * size);
      }
      for (int64_t i = 0; i < line.count; ++i) {
        float value = load<float>(bytes_of(*current, Memory::kL0C, src.address + line.from + i * 4));
        if (shape.relu && !(value > 0)) value = value != value ? value : 0;
        uint8_t* to = dst.address + line.to + i * size;
        if (type == Dtype::kFloat)
          store(to, atomic ? load<float>(to) + value : value);
        else if (type == Dtype::kHalf)
          store(to, half_bits(atomic ? half_value(load<uint16_t>(to)) + value : value));
        else
          store(to, bfloat16_bits(atomic ? bfloat16_value(load<uint16_t>(to)) + value : value));
      }
    }
  };
  issue(PIPE_FIX, std::move(operation));
}

}  // namespace emu
