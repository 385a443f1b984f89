// Runs (maximal horizontal segments of a region) and sets of runs, which are connected components.
#pragma once

#include <cstdint>

namespace corrmatch::CORRMATCH_ISA {

// Disjoint sets over borrowed memory. The root of a set is its smallest member; with runs numbered in raster order it
// is the run that holds the component's first pixel.
class DisjointSets {
 public:
  explicit DisjointSets(int32_t* parent) : parent_(parent) {}

  void add(int32_t i) { parent_[i] = i; }

  int32_t find(int32_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }

  void unite(int32_t a, int32_t b) {
    a = find(a);
    b = find(b);
    if (a < b)
      parent_[b] = a;
    else
      parent_[a] = b;
  }

  // Replaces the members begin..end-1 by the labels of their sets. Labels begin at `label` and ascend in the order of
  // the roots. Returns the next free label. All smaller members must have been replaced before.
  int32_t label_members(int32_t begin, int32_t end, int32_t label) {
    for (int32_t i = begin; i < end; ++i) parent_[i] = parent_[i] == i ? label++ : parent_[parent_[i]];
    return label;
  }

 private:
  int32_t* parent_;
};

struct Run {
  int32_t row, begin, end;  // pixels begin..end-1
};

// Unites runs of two neighbouring rows that touch. `reach` is 1 if diagonal neighbours touch, otherwise 0.
inline void link_rows(const Run* runs, int32_t above, int32_t above_end, int32_t below, int32_t below_end, int reach,
                      DisjointSets& sets) {
  for (; below < below_end; ++below) {
    while (above < above_end && runs[above].end + reach <= runs[below].begin) ++above;
    for (int32_t i = above; i < above_end && runs[i].begin < runs[below].end + reach; ++i) sets.unite(i, below);
  }
}

// Returns the sets of connected runs among `count` runs in raster order.
inline void link_runs(const Run* runs, int32_t count, int reach, DisjointSets& sets) {
  int32_t above = 0, above_end = 0;
  for (int32_t row_end, row = 0; row < count; row = row_end) {
    for (row_end = row; row_end < count && runs[row_end].row == runs[row].row; ++row_end) sets.add(row_end);
    const bool neighbours = above < above_end && runs[above].row + 1 == runs[row].row;
    if (neighbours) link_rows(runs, above, above_end, row, row_end, reach, sets);
    above = row;
    above_end = row_end;
  }
}

}  // namespace corrmatch::CORRMATCH_ISA
