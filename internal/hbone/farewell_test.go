package hbone

import (
	"net"
	"testing"

	"golang.org/x/net/http2"
)

// TestLastBytesOutliveTheTunnel drains a server whose last stream has more on its way than the peer's kernel takes, while
// the peer goes on to send: a connection that is simply closed would be reset by that, and the rest thrown away.
func TestLastBytesOutliveTheTunnel(t *testing.T) {
	const size = 1 << 20
	servers(t, func(t *testing.T, server Driver) {
		p := newPairOf(t, Goroutines(), server, PoolConfig{}, ServerConfig{Handle: func(in *Incoming) {
			if s, err := in.Accept(); err == nil {
				s.Write(make([]byte, size))
				s.CloseWrite()
			}
		}})
		r := newRawPeer(t, p)
		if err := r.nc.(*net.TCPConn).SetReadBuffer(32 << 10); err != nil {
			t.Fatal(err)
		}
		r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 2 * size})
		r.fr.WriteWindowUpdate(0, 2*size)
		r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: block()})
		drained := make(chan error, 1)
		got, away := 0, false
		err := r.frames(func(f http2.Frame) bool {
			switch f := f.(type) {
			case *http2.HeadersFrame:
				go func() { drained <- p.server.Drain(t.Context()) }()
			case *http2.DataFrame:
				got += len(f.Data())
				r.fr.WritePing(false, [8]byte{})
			case *http2.GoAwayFrame:
				away = true
			}
			return false
		})
		if got != size || !away {
			t.Errorf("got %d bytes of %d, GOAWAY %v, and then: %v", got, size, away, err)
		}
		r.nc.Close()
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
}
