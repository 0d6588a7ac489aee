// Arguments of the column sums over rows against prototypes, for every instruction-set level.
#pragma once
#include "cpu/engine/prototype_tiles.h"

namespace sslfast {

struct ColumnsInput {
  Rows teacher;  // [N, D]
  int64_t rows, d, prototypes;
  Prototypes of_teacher;  // [K, D]
  const void* bias;       // [K] in the accumulator's type, or null: a row's softmax is not taken
  const bool* taken;      // [N], or null for all
  double temperature;
  bool by_row;  // entropy and best are wanted
};

// `kept`: `keep` numbers in the accumulator's type for logits, which a visit without a bias writes and those with one
// read.
struct ColumnsOutput {
  void* column_lse;  // [K] in the accumulator's type
  void* entropy;     // [N], likewise
  int64_t* best;     // [N]
  void* kept;
  int64_t keep;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t prototype_columns_workspace(const ColumnsInput& input, const ColumnsOutput& output,
                                                    int64_t threads))
SSLFAST_DECLARE(void prototype_columns(const ColumnsInput& input, const ColumnsOutput& output, void* workspace,
                                       const Parallel& parallel))
