// Where token lists lie, over requests that end, share, wait and come back. Needs no GPU.
#include "kernels/cuda/sampling/list_places.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep::cuda {
namespace {

TEST(ListPlaces, ARequestsListsComeOnceAndItsSamplesShareThem) {
  ListPlaces places(2);
  const ListPlaces::Found first = places.Find(7);
  EXPECT_TRUE(first.fresh);
  for (int step = 0; step < 3; ++step) {
    for (int sample = 0; sample < 4; ++sample) {
      const ListPlaces::Found again = places.Find(7);
      EXPECT_FALSE(again.fresh);
      EXPECT_EQ(again.place, first.place);
    }
    EXPECT_EQ(places.used(), 1);
    places.EndStep();
  }
}

TEST(ListPlaces, AnEndedRequestsPlaceIsTakenBeforeThoseOfRequestsThatWait) {
  ListPlaces places(3);
  places.Find(1);
  places.EndStep();
  const int64_t second = places.Find(2).place;
  places.EndStep();
  places.Find(3);
  places.EndStep();
  places.Forget(2);
  EXPECT_EQ(places.used(), 2);
  const ListPlaces::Found next = places.Find(4);
  EXPECT_TRUE(next.fresh);
  EXPECT_EQ(next.place, second);
  EXPECT_FALSE(places.Find(1).fresh);
  EXPECT_FALSE(places.Find(3).fresh);
}

TEST(ListPlaces, TheOneLongestAwayMakesRoomAndComesBack) {
  ListPlaces places(2);
  const int64_t first = places.Find(1).place;
  places.EndStep();
  places.Find(2);
  places.EndStep();
  places.Find(2);
  EXPECT_EQ(places.Find(3).place, first);
  places.EndStep();
  places.Find(3);
  EXPECT_TRUE(places.Find(1).fresh);  // in the place of 2
  EXPECT_FALSE(places.Find(3).fresh);
  places.EndStep();
  EXPECT_TRUE(places.Find(2).fresh);
}

// The device may still read it, and a copy to it may be on its way.
TEST(ListPlaces, APlaceIsNotTakenInTheStepThatUsesIt) {
  ListPlaces places(2);
  const int64_t first = places.Find(1).place;
  places.Forget(1);
  EXPECT_NE(places.Find(2).place, first);
  places.EndStep();
  EXPECT_EQ(places.Find(3).place, first);
}

TEST(ListPlaces, ANumberThatWasForgottenIsFresh) {
  ListPlaces places(2);
  places.Find(5);
  places.EndStep();
  places.Forget(5);
  places.Forget(5);
  places.Forget(6);
  EXPECT_EQ(places.used(), 0);
  EXPECT_TRUE(places.Find(5).fresh);
}

// Against what lies in each place: whoever finds its lists there finds its own, whoever does not is told.
TEST(ListPlaces, AnyOrderOfRequestsReadsItsOwnLists) {
  std::mt19937 engine(3);
  constexpr int kPlaces = 5;
  ListPlaces places(kPlaces);
  std::vector<uint64_t> lies(kPlaces, 0), live;
  uint64_t next = 1;
  int64_t sent = 0, found = 0;
  for (int step = 0; step < 20000; ++step) {
    while (live.size() < 9) live.push_back(next++);
    if (engine() % 3 == 0) std::shuffle(live.begin(), live.end(), engine);  // else those that ran run on
    std::map<int64_t, uint64_t> in_use;
    for (unsigned i = 0; i < engine() % (kPlaces + 1); ++i) {
      for (unsigned sample = 0; sample <= engine() % 3; ++sample) {
        const ListPlaces::Found f = places.Find(live[i]);
        ASSERT_TRUE(f.place >= 0 && f.place < kPlaces);
        if (f.fresh) {
          ASSERT_FALSE(in_use.contains(f.place));
          lies[f.place] = live[i];
          ++sent;
        }
        ASSERT_EQ(lies[f.place], live[i]);
        in_use[f.place] = live[i];
        ++found;
      }
    }
    for (const auto& [place, request] : in_use) ASSERT_EQ(lies[place], request);
    if (engine() % 4 == 0) {
      const size_t ends = engine() % live.size();
      places.Forget(live[ends]);
      live.erase(live.begin() + static_cast<int64_t>(ends));
    }
    places.EndStep();
    ASSERT_LE(places.used(), kPlaces);
  }
  EXPECT_GT(sent, 1000);
  EXPECT_GT(found, 3 * sent);
}

TEST(ListPlacesDeathTest, AStepOfMoreRequestsThanPlacesAndATaskWithoutOneAreMistakes) {
  ListPlaces places(1);
  places.Find(1);
  EXPECT_DEATH(places.Find(2), "");
  EXPECT_DEATH(places.Find(0), "");
}

}  // namespace
}  // namespace lockstep::cuda
