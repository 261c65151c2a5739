// The fast kernel, for every instruction set of this machine, against the plain one.
//
//   attention_test [--filter TEXT] [--random COUNT] [--seed FIRST] [--max-total POSITIONS] [--one-of COUNT]
//                  [--draw SEED] [--list | --verbose]
//
// Runs the cases whose name has TEXT in it and whose calls reach no position beyond POSITIONS. COUNT random ones are
// added, of seeds FIRST, FIRST + 1, ... With --one-of, one is drawn of each COUNT neighbours, by --draw. With --verbose
// names are printed before the cases run.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <utility>

#include "cases.h"

namespace act::test {
namespace {

struct Options {
  std::string filter;
  int64_t random = 0;
  uint64_t seed = 1;
  int64_t max_total = INT64_MAX;
  int64_t one_of = 1;
  uint64_t draw = 1;
  bool list = false;
  bool verbose = false;
};

bool Parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--list" || name == "--verbose") {
      (name == "--list" ? options.list : options.verbose) = true;
      continue;
    }
    if (++i == argc) return false;
    if (name == "--filter") {
      options.filter = argv[i];
    } else if (name == "--random") {
      options.random = std::atoll(argv[i]);
    } else if (name == "--seed") {
      options.seed = std::strtoull(argv[i], nullptr, 10);
    } else if (name == "--max-total") {
      options.max_total = std::atoll(argv[i]);
    } else if (name == "--one-of") {
      options.one_of = std::max(1LL, std::atoll(argv[i]));
    } else if (name == "--draw") {
      options.draw = std::strtoull(argv[i], nullptr, 10);
    } else {
      return false;
    }
  }
  return true;
}

// Neighbours are alike, so that something is drawn of every sort.
Cases Drawn(Cases cases, const Options& options) {
  Random random(options.draw);
  Cases drawn;
  for (size_t first = 0; first < cases.size(); first += options.one_of) {
    const int64_t last = std::min<int64_t>(options.one_of, cases.size() - first) - 1;
    drawn.push_back(std::move(cases[first + random.Between(0, last)]));
  }
  return drawn;
}

Cases Chosen(const Options& options) {
  Cases cases;
  AddKernelCases(cases);
  AddHostCases(cases);
  AddRandomCases(options.random, options.seed, cases);
  Cases chosen;
  for (Case& c : cases) {
    const bool matches = c.name.find(options.filter) != std::string::npos;
    if (matches && c.total <= options.max_total) chosen.push_back(std::move(c));
  }
  return Drawn(std::move(chosen), options);
}

bool Passes(const Case& c, Tally& tally) {
  try {
    c.run(tally);
    return true;
  } catch (const std::exception& exception) {
    std::cout << "FAILED " << c.name << "\n  " << exception.what() << std::endl;
    return false;
  }
}

int Run(const Cases& cases, bool verbose) {
  constexpr int64_t kMostFailures = 20;
  constexpr double kMostUndecided = 0.005;  // of all calibrated heads
  Tally tally;
  int64_t passed = 0;
  int64_t failed = 0;
  for (const Case& c : cases) {
    if (verbose) std::cout << c.name << std::endl;
    ++(Passes(c, tally) ? passed : failed);
    if (failed == kMostFailures) {
      std::cout << "stopped after " << failed << " failures\n";
      break;
    }
  }
  std::cout << passed << " of " << cases.size() << " cases passed, " << failed << " failed; " << tally.undecided
            << " of " << tally.heads << " calibrated heads undecided; largest error " << tally.worst
            << " of its tolerance\n";
  // A single case may happen to have one.
  const double allowed = 1.0 + kMostUndecided * static_cast<double>(tally.heads);
  if (static_cast<double>(tally.undecided) > allowed) {
    std::cout << "FAILED: too many calibrated heads were not compared\n";
    return 1;
  }
  return failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace act::test

int main(int argc, char** argv) {
  using namespace act::test;
  Options options;
  if (!Parse(argc, argv, options)) {
    std::cerr << "usage: attention_test [--filter TEXT] [--random COUNT] [--seed FIRST] [--max-total POSITIONS] "
                 "[--one-of COUNT] [--draw SEED] [--list | --verbose]\n";
    return 2;
  }
  const Cases cases = Chosen(options);
  if (cases.empty()) {
    std::cerr << "no case is named like \"" << options.filter << "\"\n";
    return 2;
  }
  if (!options.list) return Run(cases, options.verbose);
  for (const Case& c : cases) std::cout << c.name << '\n';
  return 0;
}
