#include "rollout/server/unknown_fields.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/unknown_field_set.h"
#include "rollout/base/status.h"

namespace lockstep {

using google::protobuf::FieldDescriptor;

absl::Status CheckNoUnknownFields(const google::protobuf::Message& message) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  const google::protobuf::UnknownFieldSet& unknown = reflection.GetUnknownFields(message);
  if (unknown.field_count() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(message.GetDescriptor()->full_name()), ": field number ", unknown.field(0).number(),
                     " is not known to this worker; want only fields of its rollout.proto (is the client newer?)"));
  }
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    // Maps here hold scalars only.
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE || field->is_map()) continue;
    const int count = field->is_repeated() ? reflection.FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(field->is_repeated()
                                                        ? reflection.GetRepeatedMessage(message, field, i)
                                                        : reflection.GetMessage(message, field)));
    }
  }
  return absl::OkStatus();
}

}  // namespace lockstep
