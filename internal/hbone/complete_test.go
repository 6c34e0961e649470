package hbone

import (
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// TestPeerWantsNoMore: a server that has sent all and stops reading (END_STREAM, then RST_STREAM with NO_ERROR) has not
// taken anything back: Read and a relay give all of its bytes and an orderly end, also when the relay begins late.
func TestPeerWantsNoMore(t *testing.T) {
	drivers(t, func(t *testing.T, client, _ Driver) {
		body := pattern(1, 200_000)
		p, _ := newHTTP2Peer(t, client, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(200)
			w.Write(body)
		})
		open := func() *Stream {
			s, err := p.open(t.Context(), Request{Authority: "a:1"})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		over := func(s *Stream) func() bool {
			return func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.over }
		}
		s := open()
		await(t, "the end of the stream", over(s))
		if got, err := io.ReadAll(s); err != nil || string(got) != string(body) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
		for _, late := range []bool{false, true} {
			s := open()
			if late {
				await(t, "the end of the stream", over(s))
			}
			app, far := tcpPair(t)
			done := make(chan relay.Result, 1)
			s.Relay(far, func(r relay.Result) { done <- r })
			app.SetDeadline(time.Now().Add(20 * time.Second))
			if got, err := io.ReadAll(app); err != nil || string(got) != string(body) {
				t.Errorf("late %v: the application got %d bytes, %v", late, len(got), err)
			}
			app.Close()
			if r := <-done; r.Err != nil || r.Received != int64(len(body)) {
				t.Errorf("late %v: %+v", late, r)
			}
		}
	})
}

// TestQueueOutlivesTheTunnel has an application that reads slowly, and a tunnel that ends when its streams are complete:
// the application still gets all, and an orderly end.
func TestQueueOutlivesTheTunnel(t *testing.T) {
	drivers(t, func(t *testing.T, client, _ Driver) {
		body := pattern(1, 3<<20)
		p, conns := newHTTP2Peer(t, client, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(200)
			w.Write(body)
		})
		s, err := p.open(t.Context(), Request{Authority: "a:1"})
		if err != nil {
			t.Fatal(err)
		}
		app, far := tcpPair(t)
		app.SetReadBuffer(64 << 10)
		far.SetWriteBuffer(64 << 10)
		done := make(chan relay.Result, 1)
		s.Relay(far, func(r relay.Result) { done <- r })
		await(t, "the end of the stream", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.over })
		(<-conns).Close()
		await(t, "the end of the tunnel", func() bool { return p.pool.Tunnels() == 0 })
		app.SetDeadline(time.Now().Add(20 * time.Second))
		if got, err := io.ReadAll(app); err != nil || string(got) != string(body) {
			t.Errorf("the application got %d bytes, %v", len(got), err)
		}
		app.Close()
		select {
		case r := <-done:
			if r.Err != nil || r.Received != int64(len(body)) {
				t.Errorf("%+v", r)
			}
		case <-time.After(10 * time.Second):
			t.Error("the relay does not end")
		}
	})
}
