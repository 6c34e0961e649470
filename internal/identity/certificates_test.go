package identity

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// The tests of this file run on the clock of a synctest bubble: hours pass at once, and only when all sleep.

func id(name string) mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: name}
}

// counting is a Fetcher that can be made to fail, and to take its time.
type counting struct {
	ca *SelfSigned

	mu      sync.Mutex
	fetched map[mesh.Identity]int
	err     error
	delay   time.Duration
}

func newCounting(t *testing.T) *counting {
	t.Helper()
	ca, err := NewSelfSigned("cluster.local", 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &counting{ca: ca, fetched: map[mesh.Identity]int{}}
}

func (c *counting) Fetch(ctx context.Context, id mesh.Identity) (*Bundle, error) {
	c.mu.Lock()
	c.fetched[id]++
	err, delay := c.err, c.delay
	c.mu.Unlock()
	time.Sleep(delay)
	if err != nil {
		return nil, err
	}
	return c.ca.Fetch(ctx, id)
}

func (c *counting) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

func (c *counting) count(id mesh.Identity) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fetched[id]
}

// bubble runs a test on a clock of its own, with a cache that ends with it.
func bubble(t *testing.T, test func(t *testing.T, f *counting, c *Certificates)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		f := newCounting(t)
		c := NewCertificates(ctx, f, zap.NewNop())
		defer func() {
			cancel()
			c.Wait()
		}()
		test(t, f, c)
	})
}

func TestWarmIsReadyAndShared(t *testing.T) {
	bubble(t, func(t *testing.T, f *counting, c *Certificates) {
		f.delay = time.Second
		c.Warm(id("a"))
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				b, err := c.Certificate(t.Context(), id("a"))
				if err != nil || b.Identity != id("a") {
					t.Errorf("bundle %v, error %v", b, err)
				}
			})
		}
		group.Wait()
		if n := f.count(id("a")); n != 1 {
			t.Errorf("%d fetches for 50 callers, want 1", n)
		}
	})
}

func TestRotatesAtHalfLife(t *testing.T) {
	bubble(t, func(t *testing.T, f *counting, c *Certificates) {
		c.Warm(id("a"))
		first, err := c.Certificate(t.Context(), id("a"))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Hour)
		synctest.Wait()
		if n := f.count(id("a")); n != 1 {
			t.Fatalf("%d fetches after 9 of 24 hours, want 1", n)
		}
		time.Sleep(3*time.Hour + time.Minute)
		synctest.Wait()
		second, err := c.Certificate(t.Context(), id("a"))
		if err != nil || second == first || f.count(id("a")) != 2 {
			t.Errorf("after half of its life: renewed %v, %d fetches, error %v", second != first, f.count(id("a")), err)
		}
		time.Sleep(10 * 24 * time.Hour)
		if b, err := c.Certificate(t.Context(), id("a")); err != nil || time.Until(b.NotAfter) < 11*time.Hour {
			t.Errorf("after ten days: %v, %v", b, err)
		}
	})
}

func TestFailedRenewalKeepsTheValid(t *testing.T) {
	bubble(t, func(t *testing.T, f *counting, c *Certificates) {
		c.Warm(id("a"))
		first, err := c.Certificate(t.Context(), id("a"))
		if err != nil {
			t.Fatal(err)
		}
		f.fail(errors.New("the CA is away"))
		time.Sleep(20 * time.Hour)
		if b, err := c.Certificate(t.Context(), id("a")); err != nil || b != first {
			t.Errorf("while renewals fail: same certificate %v, error %v", b == first, err)
		}
		if status := c.All()[0]; status.Err == nil || status.Bundle != first {
			t.Errorf("status hides the failure: %+v", status)
		}

		// An expired one is not given out, and the error says why there is no better.
		time.Sleep(5 * time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = c.Certificate(ctx, id("a"))
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the CA is away") {
			t.Errorf("after expiry: error %v", err)
		}

		f.fail(nil)
		if b, err := c.Certificate(t.Context(), id("a")); err != nil || b == first {
			t.Errorf("when the CA is back: %v, %v", b, err)
		}
	})
}

func TestReleaseForgets(t *testing.T) {
	bubble(t, func(t *testing.T, f *counting, c *Certificates) {
		c.Warm(id("a"))
		c.Warm(id("a"))
		c.Release(id("a"))
		synctest.Wait()
		if len(c.All()) != 1 {
			t.Fatal("forgotten while still held")
		}
		c.Release(id("a"))
		c.Release(id("a"))
		if len(c.All()) != 0 {
			t.Fatal("kept after the last release")
		}
		time.Sleep(100 * time.Hour)
		if n := f.count(id("a")); n != 1 {
			t.Errorf("%d fetches, want none after the release", n)
		}
	})
}

func TestUnheldIsForgottenWhenUnused(t *testing.T) {
	bubble(t, func(t *testing.T, f *counting, c *Certificates) {
		if _, err := c.Certificate(t.Context(), id("a")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(36 * time.Hour)
		synctest.Wait()
		if len(c.All()) != 0 || f.count(id("a")) > 2 {
			t.Errorf("still %d kept, %d fetches", len(c.All()), f.count(id("a")))
		}
	})
}

func TestReleaseWhileWaiting(t *testing.T) {
	bubble(t, func(t *testing.T, f *counting, c *Certificates) {
		f.fail(errors.New("not yet"))
		c.Warm(id("a"))
		done := make(chan error)
		go func() {
			_, err := c.Certificate(t.Context(), id("a"))
			done <- err
		}()
		synctest.Wait()
		c.Release(id("a"))
		f.fail(nil)
		if err := <-done; err != nil {
			t.Errorf("a caller who waited over a release: %v", err)
		}
	})
}

func TestRenewIn(t *testing.T) {
	now := time.Now()
	b := &Bundle{NotBefore: now, NotAfter: now.Add(10 * time.Hour)}
	var got []time.Duration
	for _, tc := range []struct {
		now    time.Time
		chance float64
	}{{now, 0}, {now, 1}, {now.Add(2 * time.Hour), 0.5}, {now.Add(9 * time.Hour), 0}} {
		got = append(got, renewIn(b, tc.now, tc.chance))
	}
	want := []time.Duration{5 * time.Hour, 4 * time.Hour, 150 * time.Minute, time.Second}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("renewals (-want +got):\n%s", diff)
	}
}
