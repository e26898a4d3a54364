// The places of a buffer, and the events between the pipe that fills them and the one that empties them.
#pragma once

#include "common.h"

namespace pyalpaca_npu {

template <HardEvent kFilled, HardEvent kEmptied, int32_t kPlaces = 2>
struct Places {
  TEventID filled[kPlaces], emptied[kPlaces];

  // All are empty.
  __aicore__ inline void open(TPipe& pipe) {
    for (int32_t i = 0; i < kPlaces; ++i) {
      filled[i] = pipe.AllocEventID<kFilled>();
      emptied[i] = pipe.AllocEventID<kEmptied>();
      SetFlag<kEmptied>(emptied[i]);
    }
  }
  // When all are empty again.
  __aicore__ inline void close(TPipe& pipe) {
    for (int32_t i = 0; i < kPlaces; ++i) {
      WaitFlag<kEmptied>(emptied[i]);
      pipe.ReleaseEventID<kFilled>(filled[i]);
      pipe.ReleaseEventID<kEmptied>(emptied[i]);
    }
  }
};

// In L1, of factors in L0, of a product in L0C; in unified memory, of what comes in and of what goes out.
using PlacesInL1 = Places<HardEvent::MTE2_MTE1, HardEvent::MTE1_MTE2>;
using PlacesOfFactors = Places<HardEvent::MTE1_M, HardEvent::M_MTE1>;
using PlacesOfProducts = Places<HardEvent::M_FIX, HardEvent::FIX_M>;
using PlacesIn = Places<HardEvent::MTE2_V, HardEvent::V_MTE2>;
using PlacesOut = Places<HardEvent::V_MTE3, HardEvent::MTE3_V>;

}  // namespace pyalpaca_npu
