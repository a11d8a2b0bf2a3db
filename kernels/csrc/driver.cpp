// Routed experts and Linears: who multiplies what, in which order, on which thread. The result does not depend on the
// number of threads: every output value is summed by one thread, in the order of the experts.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "mc_cpu.h"
#include "rows.h"

namespace {

constexpr int64_t PARALLEL = 1 << 16;  // values: less is not worth waking threads for

struct Memory {  // aligned, for one call
  std::vector<uint8_t*> blocks;
  ~Memory() {
    for (uint8_t* block : blocks) ::operator delete[](block, std::align_val_t(64));
  }
  template <class T>
  T* take(int64_t count) {
    auto* block = static_cast<uint8_t*>(::operator new[](size_t(count) * sizeof(T) + 64, std::align_val_t(64)));
    blocks.push_back(block);
    return reinterpret_cast<T*>(block);
  }
};

struct Scratch {
  alignas(64) uint8_t expanded[SCRATCH];
  alignas(64) float panel[MANY * PANEL];
  const void* x[MANY];
  const float* sums[MANY];
  const float* offsets[MANY];
  float* dst[MANY];
};

Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> own(new Scratch);
  return *own;
}

// A function object as a task of the pool.
template <class F>
void parallel(int threads, int64_t tasks, const F& f) {
  pool_run(threads, tasks, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
           const_cast<void*>(static_cast<const void*>(&f)));
}

const uint8_t* codes_of(const McMatrix& m, const uint8_t* blob, int64_t panel) {
  return blob + m.codes + panel * panel_bytes(m);
}

// Panels that a thread reads one after another, and where the codes are that it reads then, as far as can be told.
struct Span {
  int64_t first, stop;
  const uint8_t* next;
};

// Multiply rows `which[0..n)` of x by one panel of a span, steps applied: out [n][PANEL].
void multiply(const Isa& isa, const McMatrix& m, const uint8_t* blob, int64_t panel, const Span& span, const Rows& x,
              const int64_t* which, int64_t n, Scratch& own, float* out) {
  for (int64_t i = 0; i < n; ++i)
    own.x[i] = x.row(which[i]), own.sums[i] = x.sum(which[i]), own.offsets[i] = x.offset(which[i]);
  int64_t zero_bytes = element_bytes(m.values == MC_INT ? int64_t(MC_U8) : m.dtype);
  PanelCall call = {};
  call.codes = codes_of(m, blob, panel);
  call.end = codes_of(m, blob, span.stop);
  call.next = span.next;
  call.scales = m.scales < 0 ? nullptr : blob + m.scales + panel * m.groups * PANEL * element_bytes(m.dtype);
  call.zeros = m.zeros < 0 ? nullptr : blob + m.zeros + panel * m.groups * PANEL * zero_bytes;
  call.matrix = &m;
  call.x_type = x.type;
  call.x = own.x;
  call.sums = own.sums;
  call.offsets = own.offsets;
  call.n = n;
  call.out = out;
  call.scratch = own.expanded;
  x.type == MC_I8 ? isa.integers(call) : isa.panel(call);
  if (x.steps)
    for (int64_t i = 0; i < n; ++i)
      for (int r = 0; r < PANEL; ++r) out[i * PANEL + r] *= x.steps[which[i]];
}

// All forms of the given rows. They are first rounded to `dtype`.
struct Forms {
  std::vector<Rows> rows;

  void make(const McLayer& layer, const Isa& isa, const void* x, int64_t stored, int64_t dtype, int64_t n,
            int64_t columns, const std::vector<int64_t>& wanted, int threads, Memory& memory) {
    rows.resize(layer.inputs);
    for (int64_t f : wanted) {
      const McInput& form = inputs_of(&layer)[f];
      Rows& made = rows[f];
      made.type = row_type(form, isa, dtype);
      made.groups = form.groups;
      made.bytes = columns * element_bytes(stored);
      bool as_is = used_as_is(form, made.type, stored) && (n <= FEW || spread(made.bytes));
      if (!as_is) made.bytes = apart(form.groups * form.padded * element_bytes(made.type));
      auto* own = as_is ? nullptr : memory.take<uint8_t>(n * made.bytes);
      auto floats = [&](bool needed, int64_t count) { return needed ? memory.take<float>(count) : nullptr; };
      float* sums = floats(form.sums, n * form.groups);
      float* steps = floats(form.rounding, n);
      float* offsets = floats(form.offsets && made.type == MC_BF16 && isa.offset_sums, n * form.groups);
      made.at = as_is ? static_cast<const uint8_t*>(x) : own;
      made.sums = sums, made.steps = steps, made.offsets = offsets;
      auto one = [&](int64_t i) {
        if (!as_is) {
          static thread_local std::vector<float> values;
          values.resize(columns);
          to_floats(static_cast<const uint8_t*>(x) + i * columns * element_bytes(stored), stored, columns, values.data());
          if (stored != dtype)
            for (float& value : values) value = narrowed(value, dtype);
          form_row(values.data(), form, made.type, own + i * made.bytes, sums ? sums + i * form.groups : nullptr,
                   steps ? steps + i : nullptr);
        }
        if (offsets) isa.offset_sums(made.row(i), form, offsets + i * form.groups);
      };
      if (!as_is || offsets) parallel(n * columns < PARALLEL ? 1 : threads, n, one);
    }
  }
};

struct Routing {  // slots sorted by expert; sentinel slots left out
  std::vector<int64_t> active, start, slot, token, position;

  bool make(const int64_t* ids, int64_t tokens, int64_t per_token, int64_t experts) {
    std::vector<int64_t> counts(experts + 1);
    for (int64_t s = 0; s < tokens * per_token; ++s) {
      if (ids[s] < 0 || ids[s] > experts) return false;
      ++counts[ids[s]];
    }
    start.assign(experts + 1, 0);
    for (int64_t e = 0; e < experts; ++e) {
      start[e + 1] = start[e] + counts[e];
      if (counts[e]) active.push_back(e);
    }
    slot.resize(start[experts]), token.resize(start[experts]), position.resize(start[experts]);
    std::vector<int64_t> next(start.begin(), start.end());
    for (int64_t s = 0; s < tokens * per_token; ++s)
      if (ids[s] < experts) {
        int64_t at = next[ids[s]]++;
        slot[at] = s, token[at] = s / per_token, position[at] = at;
      }
    return true;
  }
};

std::vector<int64_t> forms_in_use(const McLayer& layer, const std::vector<int64_t>& experts, int64_t which) {
  std::vector<int64_t> used;
  for (int64_t e : experts) {
    int64_t form = matrices_of(&layer)[e * layer.matrices + which].input;
    if (std::find(used.begin(), used.end(), form) == used.end()) used.push_back(form);
  }
  return used;
}

// How many pieces of work there are for each thread: few tokens are bound by memory, which likes long runs, many by
// arithmetic, where a thread that is done early can take more.
int64_t share(int64_t tokens) { return tokens <= 4 ? 4 : 8; }

// In how many pieces the panels of second matrices are shared out.
int64_t second_pieces(const McLayer& layer, int64_t tokens, int threads) {
  int64_t panels = (layer.hidden + PANEL - 1) / PANEL;
  return std::min<int64_t>(panels, threads > 1 ? threads * share(tokens) : std::max<int64_t>(1, tokens / 32));
}

// Where piece `piece` of the second matrices begins, or null after the last.
const uint8_t* second_start(const McLayer& layer, const uint8_t* blob, int64_t expert, int64_t piece, int64_t pieces) {
  int64_t panels = (layer.hidden + PANEL - 1) / PANEL;
  const McMatrix& m = matrices_of(&layer)[expert * layer.matrices + 1];
  return piece < pieces ? codes_of(m, blob, panels * piece / pieces) : nullptr;
}

// gate_up and activation for every slot: inner float32 [slots, width]
void first_matrices(const McLayer& layer, const uint8_t* blob, const Isa& isa, const Routing& routing,
                    const Forms& forms, float* inner, int64_t tokens, int threads) {
  std::vector<int64_t> heavy = routing.active;  // most work first, so that no thread is left alone with it
  std::stable_sort(heavy.begin(), heavy.end(), [&](int64_t a, int64_t b) {
    return routing.start[a + 1] - routing.start[a] > routing.start[b + 1] - routing.start[b];
  });
  int64_t panels = matrices_of(&layer)[0].panels;
  int64_t pieces = std::min<int64_t>(panels, (2 * threads * share(tokens) - 1) / int64_t(heavy.size()) + 1);
  int64_t width = layer.gated ? BLOCK : PANEL, tasks = int64_t(heavy.size()) * pieces;
  auto matrix = [&](int64_t task) -> const McMatrix& {
    return matrices_of(&layer)[heavy[task / pieces] * layer.matrices];
  };
  auto begins = [&](int64_t task) { return panels * (task % pieces) / pieces; };
  parallel(threads, tasks, [&](int64_t task) {
    Scratch& own = scratch();
    int64_t e = heavy[task / pieces], later = task + threads;
    const McMatrix& m = matrix(task);
    Span span = {begins(task), panels * (task % pieces + 1) / pieces, nullptr};
    int64_t then = second_pieces(layer, tokens, threads);
    span.next = later < tasks ? codes_of(matrix(later), blob, begins(later))
                              : second_start(layer, blob, routing.active[0], later - tasks, then);
    const float* bias = layer.bias_up < 0 ? nullptr
                        : reinterpret_cast<const float*>(blob + layer.bias_up) + e * panels * PANEL;
    int64_t waiting = 0;  // single rows wait for each other: one vector at a time would be bound by latency
    auto activate = [&](int64_t keep) {
      if (waiting) isa.activate({own.panel, own.dst, waiting, keep, &layer});
      waiting = 0;
    };
    for (int64_t panel = span.first; panel < span.stop; ++panel)
      for (int64_t from = routing.start[e]; from < routing.start[e + 1]; from += MANY) {
        int64_t n = std::min(MANY, routing.start[e + 1] - from), keep = std::min(width, layer.width - panel * width);
        bool alone = n > 1 || keep < width;
        if (alone || waiting == MANY) activate(width);
        float* out = own.panel + waiting * PANEL;
        multiply(isa, m, blob, panel, span, forms.rows[m.input], routing.token.data() + from, n, own, out);
        for (int64_t i = 0; i < n; ++i) {
          for (int r = 0; bias && r < PANEL; ++r) out[i * PANEL + r] += bias[panel * PANEL + r];
          own.dst[waiting + i] = inner + (from + i) * layer.width + panel * width;
        }
        waiting += n;
        if (alone) activate(keep);
      }
    activate(width);
  });
}

// down and the weighted sum over slots: out [tokens, hidden] in dtype
void second_matrices(const McLayer& layer, const uint8_t* blob, const Isa& isa, const Routing& routing,
                     const Forms& forms, const float* weights, int64_t tokens, int64_t dtype, uint8_t* out,
                     Memory& memory, int threads) {
  int64_t panels = (layer.hidden + PANEL - 1) / PANEL, pieces = second_pieces(layer, tokens, threads);
  float* total = memory.take<float>(tokens * panels * PANEL);
  parallel(threads, pieces, [&](int64_t piece) {
    Scratch& own = scratch();
    int64_t first = panels * piece / pieces, stop = panels * (piece + 1) / pieces, size = (stop - first) * PANEL;
    float* sums = total + tokens * first * PANEL;  // [tokens][size]
    std::fill(sums, sums + tokens * size, 0.0f);
    for (size_t at = 0; at < routing.active.size(); ++at) {
      int64_t e = routing.active[at];
      const McMatrix& m = matrices_of(&layer)[e * layer.matrices + 1];
      bool last = at + 1 == routing.active.size();
      int64_t then = routing.active[last ? 0 : at + 1];
      Span span = {first, stop, second_start(layer, blob, then, last ? piece + threads : piece, pieces)};
      const float* bias = layer.bias_down < 0 ? nullptr
                          : reinterpret_cast<const float*>(blob + layer.bias_down) + e * panels * PANEL;
      for (int64_t panel = first; panel < stop; ++panel)
        for (int64_t from = routing.start[e]; from < routing.start[e + 1]; from += MANY) {
          int64_t n = std::min(MANY, routing.start[e + 1] - from);
          multiply(isa, m, blob, panel, span, forms.rows[m.input], routing.position.data() + from, n, own, own.panel);
          for (int64_t i = 0; i < n; ++i) {
            float* to = sums + routing.token[from + i] * size + (panel - first) * PANEL;
            float weight = weights[routing.slot[from + i]];
            for (int r = 0; bias && r < PANEL; ++r) own.panel[i * PANEL + r] += bias[panel * PANEL + r];
            for (int r = 0; r < PANEL; ++r) to[r] += weight * own.panel[i * PANEL + r];
          }
        }
    }
    int64_t keep = std::min(size, layer.hidden - first * PANEL), bytes = element_bytes(dtype);
    for (int64_t t = 0; t < tokens; ++t)
      from_floats(sums + t * size, dtype, keep, out + (t * layer.hidden + first * PANEL) * bytes);
  });
}

}  // namespace

int run_moe(const McLayer& layer, const uint8_t* blob, const Isa& isa, const void* x, int64_t dtype, const int64_t* ids,
            const float* weights, int64_t tokens, int64_t per_token, void* out, int threads) {
  Routing routing;
  if (!routing.make(ids, tokens, per_token, layer.experts)) return MC_BAD_ID;
  if (routing.active.empty()) {
    std::memset(out, 0, tokens * layer.hidden * element_bytes(dtype));
    return MC_OK;
  }
  Memory memory;
  int64_t slots = int64_t(routing.slot.size());
  Forms before, after;
  before.make(layer, isa, x, dtype, dtype, tokens, layer.hidden, forms_in_use(layer, routing.active, 0), threads, memory);
  float* inner = memory.take<float>(slots * layer.width);
  first_matrices(layer, blob, isa, routing, before, inner, tokens, threads);
  std::vector<int64_t> wanted = forms_in_use(layer, routing.active, 1);
  after.make(layer, isa, inner, MC_F32, dtype, slots, layer.width, wanted, threads, memory);
  second_matrices(layer, blob, isa, routing, after, weights, tokens, dtype, static_cast<uint8_t*>(out), memory, threads);
  return MC_OK;
}

int run_linear(const McLayer& layer, const uint8_t* blob, const Isa& isa, const void* x, int64_t dtype, int64_t n,
               void* out, int threads) {
  Memory memory;
  Forms forms;
  const McMatrix& m = matrices_of(&layer)[0];
  forms.make(layer, isa, x, dtype, dtype, n, m.columns, {m.input}, threads, memory);
  std::vector<int64_t> which(n);
  for (int64_t i = 0; i < n; ++i) which[i] = i;
  int64_t pieces = std::min<int64_t>(m.panels, threads * 8), bytes = element_bytes(dtype);
  parallel(threads, pieces, [&](int64_t piece) {
    Scratch& own = scratch();
    int64_t later = std::min(piece + threads, pieces);
    const uint8_t* next = codes_of(m, blob, m.panels * later / pieces);
    Span span = {m.panels * piece / pieces, m.panels * (piece + 1) / pieces, next};
    for (int64_t panel = span.first; panel < span.stop; ++panel)
      for (int64_t from = 0; from < n; from += MANY) {
        int64_t count = std::min(MANY, n - from), keep = std::min<int64_t>(PANEL, m.rows - panel * PANEL);
        multiply(isa, m, blob, panel, span, forms.rows[m.input], which.data() + from, count, own, own.panel);
        for (int64_t i = 0; i < count; ++i)
          from_floats(own.panel + i * PANEL, dtype, keep,
                      static_cast<uint8_t*>(out) + ((from + i) * m.rows + panel * PANEL) * bytes);
      }
  });
  return MC_OK;
}
