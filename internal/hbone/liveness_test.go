package hbone

import (
	"io"
	"testing"
	"time"
)

// TestIdleTunnelsOfAServer: a server ends the tunnels that carry nothing, and no others; a client that keeps its tunnels
// for longer opens the next stream all the same.
func TestIdleTunnelsOfAServer(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		const idle = 100 * time.Millisecond
		p := newPairOf(t, client, server, PoolConfig{}, ServerConfig{PingInterval: 10 * time.Millisecond, PingTimeout: 10 * time.Second, IdleTimeout: idle})
		s, err := p.open(t.Context(), Request{Authority: "a:1"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * idle) // with a stream on it, even one that says nothing, it stays
		s.Write([]byte("still there"))
		if _, err := io.ReadFull(s, make([]byte, 11)); err != nil {
			t.Fatal(err)
		}
		s.CloseWrite()
		io.ReadAll(s)
		await(t, "the tunnel's end", func() bool { return p.admitted() == 0 && p.pool.Tunnels() == 0 })
		if s, err = p.open(t.Context(), Request{Authority: "a:1"}); err != nil {
			t.Fatal(err)
		}
		s.Close()
	})
}

// TestIdling looks at a tunnel from time to time.
func TestIdling(t *testing.T) {
	start := time.Now()
	i := idling{after: 10 * time.Second}
	for _, tt := range []struct {
		at      time.Duration
		streams int
		newest  uint32
		want    bool
	}{
		{0, 0, 0, false}, {9, 0, 0, false}, {10, 1, 1, false}, {15, 1, 1, false}, {21, 0, 1, false}, {26, 0, 1, true},
		{30, 0, 9, false}, // streams came and went in between
		{39, 0, 9, false}, {40, 0, 9, true},
	} {
		if got := i.over(start.Add(tt.at*time.Second), tt.streams, tt.newest); got != tt.want {
			t.Errorf("after %d s: %v", tt.at, got)
		}
	}
	if never := (&idling{}); never.over(start, 0, 0) || never.over(start.Add(time.Hour), 0, 0) {
		t.Error("ended although it is never to be")
	}
}
