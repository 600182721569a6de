# A CMake toolchain file: compiles for Linux on aarch64 with Debian's package g++-aarch64-linux-gnu.
#     cmake -S . -B build/arm -DCMAKE_TOOLCHAIN_FILE=tools/arm/aarch64-linux-gnu.cmake \
#           -DTXL_PYTHON_MODULE=OFF -DTXL_TORCH_DIR=/folder/of/a/torch/for/aarch64
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
