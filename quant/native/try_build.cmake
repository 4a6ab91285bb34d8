# Configure and build the native kernels; if that fails, warn and leave nothing to install.
# Variables: SOURCE, BINARY, OUT (folder of the module), CACHE (initial cache), GENERATOR.
function(give_up what log)
  file(REMOVE_RECURSE "${OUT}")
  string(REGEX MATCH "[^\n]*[Ee]rror(:| at)[^\n]*" line "${log}")
  message(WARNING "mconv: ${what}; installing without native kernels (slower quantization). "
                  "${line}\nWhole log: ${BINARY}/failure.log")
  file(WRITE "${BINARY}/failure.log" "${log}")
endfunction()

function(try_step what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE log ERROR_VARIABLE log)
  if(NOT status EQUAL 0)
    give_up("${what}" "${log}")
  endif()
  set(status "${status}" PARENT_SCOPE)
endfunction()

cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
file(MAKE_DIRECTORY "${OUT}")
try_step("the native kernels cannot be configured"
  "${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${SOURCE}" -B "${BINARY}" -C "${CACHE}")
if(status EQUAL 0)
  try_step("the native kernels do not compile"
    "${CMAKE_COMMAND}" --build "${BINARY}" --config Release --parallel ${cores})
endif()
