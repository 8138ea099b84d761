"""What was asked of the driver is asked once per device and key, also by several host threads at
once."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_source

ROOT = Path(__file__).parents[3]
EIGHT_THREADS = """
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>
#include "launch.h"

int main() {
  nitp::cuda::DriverCache<int, int> known;
  int asked = 0, wrong = 0;
  std::mutex counting;
  const auto ask_all = [&] {
    for (int round = 0; round < 200; ++round) {
      for (int key = 0; key < 20; ++key) {
        const int device = key % 2;
        const int told = known.get(device, key, [&] { return ++asked, 100 * device + key; });
        const std::lock_guard<std::mutex> lock(counting);
        wrong += told != 100 * device + key;
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back(ask_all);
  for (std::thread& thread : threads) thread.join();
  std::printf("%d asked, %d wrong", asked, wrong);
}
"""


def test_the_driver_is_asked_once_by_eight_threads(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH")
    program = tmp_path / "threads"
    command = [
        "g++",
        "-std=c++20",
        "-g",
        "-O1",
        "-fsanitize=thread",
        "-Wno-unknown-pragmas",
        "-pthread",
    ]
    folders = [f"-I{ROOT / 'tests/kernels/cuda_source/simt'}", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run(
        [*command, *folders, "-x", "c++", "-", "-o", str(program)],
        input=EIGHT_THREADS,
        text=True,
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {done.stderr.splitlines()[0]}")
    assert (done.returncode, done.stdout) == (0, "20 asked, 0 wrong"), done.stderr
