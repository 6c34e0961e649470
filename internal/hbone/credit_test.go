package hbone

import (
	"io"
	"sync"
	"testing"
	"time"
)

// TestLittleReadOfManyStreams: where there is no room for a big window, a little that was read of each of many streams that
// stay open is told to the peer before the window is used up.
func TestLittleReadOfManyStreams(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		const streams, little = 3 * leastWindow / creditRest, creditRest - 1
		var read sync.WaitGroup
		p := newPairOf(t, client, server, PoolConfig{MaxStreamsPerTunnel: 2 * streams}, ServerConfig{Buffers: NewBuffers(0, nil),
			Handle: func(in *Incoming) {
				s, err := in.Accept()
				if err != nil {
					return
				}
				io.ReadFull(s, make([]byte, little))
				read.Done()
			}})
		for i := range streams {
			s, err := p.open(t.Context(), Request{Authority: "a:1"})
			if err != nil {
				t.Fatal(err)
			}
			read.Add(1)
			s.Write(pattern(i, little))
			all := make(chan struct{})
			go func() { read.Wait(); close(all) }()
			select {
			case <-all:
			case <-time.After(20 * time.Second):
				t.Fatalf("nothing comes to stream %d, of the others all was read", i)
			}
		}
	})
}
