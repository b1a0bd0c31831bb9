// One function a pass; what each does is said in passes.cc.
#pragma once

#include "fastpage/program.h"

namespace fastpage {

Program fuse_rotary_cache(const Program& program);
Program fuse_activation(const Program& program);
Program fuse_residual(const Program& program);
Program fuse_norm(const Program& program);
Program fuse_add_norm(const Program& program);
Program fuse_qk_norm(const Program& program);

}  // namespace fastpage
