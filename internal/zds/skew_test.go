package zds

import (
	"encoding/hex"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"google.golang.org/protobuf/proto"

	"github.com/fairlead-mesh/fairlead/api/zds"
)

// The messages as they are on the wire, in hexadecimal: a release of the agent works with the proxy of the one before and of
// the one after (docs/upgrades.md), and both with Istio's. Add to them; never change them.
var pinned = map[string]struct {
	wire    string
	message proto.Message
}{
	"hello": {"0801", &zds.ZdsHello{Version: zds.Version_V1}},
	"add": {"0a0e" + "0a0175" + "1209" + "0a016e" + "120173" + "1a0161", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{
		Uid: "u", WorkloadInfo: &zds.WorkloadInfo{Name: "n", Namespace: "s", ServiceAccount: "a"},
	}}}},
	"del":      {"12" + "03" + "120175", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: "u"}}}},
	"snapshot": {"1a00", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_SnapshotSent{SnapshotSent: &zds.SnapshotSent{}}}},
	"keep":     {"2a" + "03" + "0a0175", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Keep{Keep: &zds.KeepWorkload{Uid: "u"}}}},
	"ack":      {"0a00", &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{}}}},
	"refusal":  {"0a" + "04" + "0a026e6f", &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{Error: "no"}}}},
}

// later is a field that no message has yet: number 100, two bytes long.
const later = "a206" + "02" + "0102"

func TestMessagesOfOtherReleases(t *testing.T) {
	for name, p := range pinned {
		wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(p.message)
		if err != nil || hex.EncodeToString(wire) != p.wire {
			t.Errorf("%s is sent as %x, %v, want %s", name, wire, err, p.wire)
		}
		for _, text := range []string{p.wire, p.wire + later} {
			got := p.message.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(unhex(t, text), got); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got.ProtoReflect().SetUnknown(nil)
			if !proto.Equal(p.message, got) {
				t.Errorf("%s (%s) is read as %v", name, text, got)
			}
		}
	}
}

// TestAgentOfALaterRelease says what this proxy does not know: it says so, and goes on.
func TestAgentOfALaterRelease(t *testing.T) {
	socket := t.TempDir() + "/z.sock"
	l, err := Listen("unixpacket", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := newProxy()
	connect(t, socket, p)
	l.SetDeadline(time.Now().Add(10 * time.Second))
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := hello(conn); err != nil {
		t.Fatal(err)
	}
	if answer := exchange(t, conn, "fa06"+"00"); !strings.Contains(answer, "does not know") { // another kind of request
		t.Errorf("it answered %q", answer)
	}
	if answer := exchange(t, conn, pinned["keep"].wire+later); answer != "" {
		t.Errorf("it refused what it knows: %q", answer)
	}
	if answer := exchange(t, conn, pinned["snapshot"].wire); answer != "" {
		t.Errorf("it refused what it knows: %q", answer)
	}
	p.heard(t, "snapshot [u]")
}

// TestProxyOfALaterRelease greets with more than this agent knows, and refuses a pod with more than a word.
func TestProxyOfALaterRelease(t *testing.T) {
	s := NewServer(zaptest.NewLogger(t))
	socket := t.TempDir() + "/z.sock"
	serve(t, s, socket)
	s.Synced()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write(unhex(t, pinned["hello"].wire+later)); err != nil {
		t.Fatal(err)
	}
	said := func(want string) {
		t.Helper()
		b := make([]byte, maxMessage)
		n, err := conn.Read(b)
		if err != nil || hex.EncodeToString(b[:n]) != want {
			t.Fatalf("the agent said %x, %v, want %s", b[:n], err, want)
		}
	}
	said(pinned["snapshot"].wire)
	if _, err := conn.Write(unhex(t, pinned["ack"].wire+later)); err != nil {
		t.Fatal(err)
	}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	answer := make(chan error, 1)
	go func() {
		answer <- s.Add(t.Context(), Workload{UID: "u", Name: "n", Namespace: "s", ServiceAccount: "a", Netns: ns})
	}()
	said(pinned["add"].wire)
	if _, err := conn.Write(unhex(t, pinned["refusal"].wire+later)); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err == nil || !strings.Contains(err.Error(), "no") {
		t.Errorf("the agent understood %v", err)
	}
}

// exchange sends a request without a descriptor and returns the error that comes back.
func exchange(t *testing.T, conn *net.UnixConn, request string) string {
	t.Helper()
	if _, err := conn.Write(unhex(t, request)); err != nil {
		t.Fatal(err)
	}
	var response zds.WorkloadResponse
	if files, err := receive(conn, &response); err != nil || len(files) != 0 || response.GetAck() == nil {
		t.Fatalf("the answer: %v, %d descriptors, %v", &response, len(files), err)
	}
	return response.GetAck().GetError()
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
