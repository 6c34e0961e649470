package waypoint

import (
	"context"
	"errors"
	"net/http"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
)

// reason is why a request or connection ended as it did.
type reason uint8

const (
	reasonNone reason = iota
	reasonDenied
	reasonNoRoute
	reasonNoService
	reasonNotReady
	reasonNoBackend
	reasonNoEndpoint
	reasonConnect
	reasonUpstreamDenied
	reasonTimeout
	reasonUpstreamReset
	reasonClientGone
	reasonBadRequest
	reasonPolicyChanged
)

// reasons is the one table of them: the flag of access log and metrics (Envoy's letters where it has one), the status a
// client is answered with, and the body.
var reasons = [...]struct {
	flag   string
	status int
	body   string
}{
	reasonNone:           {"-", 0, ""},
	reasonDenied:         {"RBAC", http.StatusForbidden, deniedBody},
	reasonNoRoute:        {"NR", http.StatusNotFound, ""},
	reasonNoService:      {"NR", http.StatusNotFound, "no such service at this waypoint"},
	reasonNotReady:       {"NC", http.StatusServiceUnavailable, "the waypoint has no configuration yet"},
	reasonNoBackend:      {"NC", http.StatusInternalServerError, ""},
	reasonNoEndpoint:     {"UH", http.StatusServiceUnavailable, "no healthy upstream"},
	reasonConnect:        {"UF", http.StatusServiceUnavailable, "upstream connect error"},
	reasonUpstreamDenied: {"UF,DENY", http.StatusServiceUnavailable, "upstream refused the connection by policy"},
	reasonTimeout:        {"UT", http.StatusGatewayTimeout, "upstream request timeout"},
	reasonUpstreamReset:  {"UC", http.StatusServiceUnavailable, "upstream connection ended before the response"},
	reasonClientGone:     {"DC", 499, ""},
	reasonBadRequest:     {"DPE", http.StatusBadRequest, "bad request"},
	reasonPolicyChanged:  {"RBAC", http.StatusForbidden, deniedBody},
}

func (r reason) flag() string { return reasons[r].flag }

// failure is a request or connection that came to nothing.
type failure struct {
	reason reason
	detail string
	// connect: nothing was sent, so that another endpoint may be tried.
	connect bool
	err     error
}

func (f *failure) Error() string {
	switch {
	case f.err == nil:
		return f.detail
	case f.detail == "":
		return f.err.Error()
	default:
		return f.detail + ": " + f.err.Error()
	}
}

func (f *failure) Unwrap() error { return f.err }

// connectFailure classifies an error of opening a connection to an endpoint.
func connectFailure(err error) *failure {
	var status *hbone.StatusError
	if errors.As(err, &status) && status.Code == http.StatusUnauthorized {
		return &failure{reason: reasonUpstreamDenied, err: err}
	}
	return &failure{reason: reasonConnect, connect: true, err: err}
}

// classify finds the reason behind an error of a request under way. clientGone tells that the client left first.
func classify(err error, clientGone bool) *failure {
	var f *failure
	switch {
	case clientGone:
		return &failure{reason: reasonClientGone, err: err}
	case errors.As(err, &f):
		return f
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{reason: reasonTimeout, err: err}
	default:
		return &failure{reason: reasonUpstreamReset, err: err}
	}
}
