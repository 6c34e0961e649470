package lab

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Marker is what every payload consists of: the capture looks for it on the wire.
const Marker = "READABLE-PAYLOAD;"

// Ports where every pod's program listens, on all its addresses.
const (
	PortHTTP = 8080 // HTTP/1.1 and HTTP/2 in clear
	PortTCP  = 9090 // a conversation of sized messages
)

// Call is what a pod's program is asked to try.
type Call struct {
	// To is where to connect, address:port.
	To string
	// HTTP makes the call an HTTP request; otherwise it is a message over TCP that comes back.
	HTTP bool
	// Method, Path, Host and Header are the request's; empty means GET, /, the address, none.
	Method, Path, Host string
	Header             map[string]string
	// Size is how many bytes of payload go each way; 0 means 2 KiB.
	Size int
	// Count is how many exchanges to make; 0 means one, or with Duration as many as fit.
	Count int
	// Duration ends the call early, after a whole exchange.
	Duration time.Duration
	// Interval is the pause between exchanges.
	Interval time.Duration
	// SameConnection makes all exchanges on one connection, and ends at the first that fails.
	SameConnection bool
	// Timeout bounds each exchange, connecting included; 0 means 3 s.
	Timeout time.Duration
	// Conversation makes the call one of Conversations, whose port To has, and Answered asks the server's program what it
	// saw of the last one. All other fields are ignored.
	Conversation string
	Answered     bool
}

// Answer is what came of a Call.
type Answer struct {
	Attempts []Attempt
	// Words are what a side of a conversation saw.
	Words string
}

// Attempt is one exchange.
type Attempt struct {
	Start time.Time
	Took  time.Duration
	// Server is the pod that answered, Seen the client's address as the server saw it.
	Server, Seen string
	// Local is the connection's address at the client's end; empty when there was no connection.
	Local string
	// Status is the HTTP status, 0 when there was no answer or the call was TCP.
	Status int
	// Body is the beginning of an HTTP body that is not the server program's.
	Body string
	// Error says why there was no answer, and Refused that it was ECONNREFUSED.
	Error   string
	Refused bool
}

// OK tells whether the exchange brought back what it should: all bytes, and with HTTP the status 200.
func (a Attempt) OK() bool { return a.Error == "" && (a.Status == 0 || a.Status == 200) }

// OK tells whether there were exchanges, and all of them succeeded.
func (a Answer) OK() bool {
	return len(a.Attempts) > 0 && !slices.ContainsFunc(a.Attempts, Attempt.failed)
}

// Failed tells whether no exchange succeeded.
func (a Answer) Failed() bool { return !slices.ContainsFunc(a.Attempts, Attempt.OK) }

func (a Attempt) failed() bool { return !a.OK() }

// Last is the last exchange.
func (a Answer) Last() Attempt {
	if len(a.Attempts) == 0 {
		return Attempt{Error: "nothing was tried"}
	}
	return a.Attempts[len(a.Attempts)-1]
}

// Servers counts the successful exchanges by the pod that answered.
func (a Answer) Servers() map[string]int {
	n := map[string]int{}
	for _, t := range a.Attempts {
		if t.OK() {
			n[t.Server]++
		}
	}
	return n
}

// String sums the exchanges up.
func (a Answer) String() string {
	outcomes := map[string]int{}
	for _, t := range a.Attempts {
		switch {
		case t.Error != "":
			outcomes[t.Error]++
		case t.Status != 0:
			outcomes[fmt.Sprintf("status %d by %s %s", t.Status, t.Server, t.Body)]++
		default:
			outcomes["answered by "+t.Server]++
		}
	}
	var parts []string
	for what, n := range outcomes {
		parts = append(parts, fmt.Sprintf("%d× %s", n, what))
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

// payload is size bytes of markers.
func payload(size int) []byte {
	return []byte(strings.Repeat(Marker, size/len(Marker)+1)[:size])
}
