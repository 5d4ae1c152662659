// Names of kernels as people read them.
#pragma once

#include <string>
#include <string_view>

namespace lockstep {

// "DecodeKernel<Cudnn, 2>" of "void a::(anonymous namespace)::DecodeKernel<a::Cudnn, (int)2>(a::Args)", mangled or not:
// without result type, arguments, namespaces and casts of template arguments. Longer than 48 characters, template
// arguments are cut off: "DecodeKernel<Cudnn, ...>".
std::string ShortKernelName(std::string_view name);

// Without template arguments: "DecodeKernel".
std::string_view KernelBaseName(std::string_view short_name);

}  // namespace lockstep
