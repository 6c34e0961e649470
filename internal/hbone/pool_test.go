package hbone

import (
	"io"
	"testing"
)

// TestTunnelsAreMadeAndUsedAgain: as many tunnels stand as the peer's limit of streams asks for, and one whose streams have
// become fewer takes new ones before another is made.
func TestTunnelsAreMadeAndUsedAgain(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPairOf(t, client, server, PoolConfig{}, ServerConfig{MaxStreams: 2, Handle: echoHandler})
		open := func() *Stream {
			t.Helper()
			s, err := p.open(t.Context(), Request{Authority: "a:1"})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		end := func(s *Stream) {
			t.Helper()
			s.CloseWrite()
			if _, err := io.ReadAll(s); err != nil {
				t.Fatal(err)
			}
			await(t, "the end of the stream", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.over })
		}
		end(open()) // the peer's limit is known from now on
		var all []*Stream
		for range 5 {
			all = append(all, open())
		}
		if n := p.pool.Tunnels(); n != 3 {
			t.Errorf("%d tunnels for five streams, two to each", n)
		}
		for i, s := range all {
			end(s)
			all[i] = open()
			if n := p.pool.Tunnels(); n != 3 {
				t.Errorf("%d tunnels after stream %d was replaced", n, i)
			}
		}
		for _, s := range all {
			s.Close()
		}
	})
}
