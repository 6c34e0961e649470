package hbone

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// TestEarlyData has a server that answers only when it has seen the application's first bytes.
func TestEarlyData(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) {
			await(t, "bytes before the answer", func() bool {
				in.s.mu.Lock()
				defer in.s.mu.Unlock()
				return len(in.s.rq) > 0
			})
			echoHandler(in)
		})
		for _, n := range []int{1, 100000, 9 << 20} {
			s, err := p.open(t.Context(), Request{Authority: "a:1", Early: true})
			if err != nil {
				t.Fatal(err)
			}
			app, far := tcpPair(t)
			done := make(chan relay.Result, 1)
			s.Relay(far, func(r relay.Result) { done <- r })
			want := pattern(n, n)
			go func() { app.Write(want); app.CloseWrite() }()
			app.SetDeadline(time.Now().Add(20 * time.Second))
			if got, err := io.ReadAll(app); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes: got %d, %v", n, len(got), err)
			}
			if r := <-done; r != (relay.Result{Sent: int64(n), Received: int64(n)}) {
				t.Errorf("%d bytes: %+v", n, r)
			}
		}
	})
}

func TestEarlyDataIsRefused(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) {
			time.Sleep(5 * time.Millisecond)
			in.Reject(401, "no")
		})
		for range 5 {
			s, err := p.open(t.Context(), Request{Authority: "a:1", Early: true})
			if err != nil {
				t.Fatal(err)
			}
			app, far := tcpPair(t)
			done := make(chan relay.Result, 1)
			s.Relay(far, func(r relay.Result) { done <- r })
			app.Write(make([]byte, 10000)) // little enough that no Write is under way to take the error before Read
			app.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := app.Read(make([]byte, 1)); !errors.Is(err, errConnReset) {
				t.Errorf("the application sees %v", err)
			}
			var status *StatusError
			if r := <-done; !errors.As(r.Err, &status) || status.Code != 401 || status.Reason != "no" {
				t.Errorf("result %+v", r)
			}
		}
		s, err := p.open(t.Context(), Request{Authority: "a:1", Early: true})
		if err != nil {
			t.Fatal(err)
		}
		var status *StatusError
		if _, err := s.Read(make([]byte, 1)); !errors.As(err, &status) {
			t.Errorf("Read gives %v", err)
		}
	})
}
