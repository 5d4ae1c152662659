// Refuses what this program's .proto does not know: a client built from a newer one asks for something it would not
// get.
#pragma once

#include "absl/status/status.h"
#include "google/protobuf/message.h"

namespace lockstep {

// INVALID_ARGUMENT naming the message and field number of the first unknown field, at any depth.
absl::Status CheckNoUnknownFields(const google::protobuf::Message& message);

}  // namespace lockstep
